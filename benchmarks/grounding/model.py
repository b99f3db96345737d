"""A prefix vision-language model of about 110k parameters, sampled with a KV cache, and its supervised warm start."""

import math

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional
from transformers.modeling_outputs import CausalLMOutput

from grounding import keep, task
from srpo import PixelLayout

WIDTH, LAYERS, HEADS = 64, 2, 4
PATCH = task.SIDE  # pixels per side of an image token: one for each digit
PATCHES = task.DIGITS
PREFIX = PATCHES + task.PROMPT  # image tokens and prompt
LAYOUT = PixelLayout("images", task.SIDE // 2, (0.5,), (0.5,))  # masks cover quarters of digits
WARM_START_STEPS, WARM_START_LR = 500, 1e-2
DEMONSTRATIONS, SUMS, LOOKUPS = 48, 200, 100  # of a step of the warm start


class Block(nn.Module):
    """Attention and a feed-forward layer, each behind a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor, allowed: Tensor, cache: list[Tensor] | None = None) -> Tensor:
        """Run on `x` `[B, S, H]`; `cache` holds keys and values of the columns before, and gets those of `x`."""
        B, S, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(B, S, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        if cache is not None:
            cache[:] = k, v = (k, v) if not cache else (torch.cat([cache[0], k], 2), torch.cat([cache[1], v], 2))
        scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~allowed, -torch.inf)
        x = x + self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(B, S, WIDTH))
        return x + self.down(functional.gelu(self.up(self.norm2(x))))


class PrefixVLMConfig(transformers.PreTrainedConfig):
    """Name the model, and the id that stands for a part of a picture: none of a word."""

    model_type = "prefix_vlm"
    image_token_id = len(task.WORDS)


class PrefixVLM(transformers.PreTrainedModel):
    """Image tokens, which see each other, then text, which sees what is before it: a causal model of transformers."""

    config_class = PrefixVLMConfig

    def __init__(self, config: PrefixVLMConfig | None = None) -> None:
        super().__init__(PrefixVLMConfig() if config is None else config)
        self.patch = nn.Linear(PATCH**2, WIDTH)
        self.words, self.before = nn.Embedding(len(task.WORDS), WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
        self.positions = nn.Parameter(torch.empty(PREFIX + task.LENGTH, WIDTH))
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, len(task.WORDS), bias=False)
        for table in (self.words.weight, self.positions):
            nn.init.normal_(table, std=0.3)

    def get_output_embeddings(self) -> nn.Linear:
        """Return the head."""
        return self.head

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        use_cache: bool = False,
    ) -> CausalLMOutput:
        """Return the logits `[B, S, words]`.

        Args:
            input_ids: `[B, S]`, a picture as PATCHES image tokens.
            attention_mask: `[B, S]` 0/1.
            position_ids: `[B, S]`; None counts columns.
            pixel_values: `[B, 1, 8, 32]`.
            use_cache: nothing is kept.
        """
        image = input_ids == self.config.image_token_id
        x = self.read(input_ids.masked_fill(image, task.PAD), attention_mask != 0)
        if pixel_values is not None:
            x = x.masked_scatter(image[..., None], self.see(pixel_values))
        S = input_ids.shape[1]
        columns = torch.arange(S)
        # padding behind another rollout's longer perception may lie beyond the last position
        x = x + self.positions[(columns if position_ids is None else position_ids).clamp(max=len(self.positions) - 1)]
        allowed = (columns <= columns[:, None]) | (image[:, None, :] & image[:, :, None])
        allowed = (allowed & (attention_mask != 0)[:, None, :]) | torch.eye(S, dtype=torch.bool)
        for block in self.blocks:
            x = block(x, allowed[:, None])
        return CausalLMOutput(logits=self.head(self.norm(x)))

    def states(self, pixels: Tensor, ids: Tensor) -> Tensor:
        """Return the last states `[B, PATCHES + text, H]` that the head is called on, of whole sequences.

        Args:
            pixels: `[B, 1, 8, 32]`.
            ids: `[B, text]`, prompt and completion.
        """
        x = torch.cat([self.see(pixels), self.read(ids)], 1)
        return self.run(x, 0, _allowed(PATCHES, x.shape[1]))

    def run(self, x: Tensor, first: int, allowed: Tensor) -> Tensor:
        """Run embedded tokens `[B, S, H]` whose positions start at `first`."""
        x = x + self.positions[first : first + x.shape[1]]
        for block in self.blocks:
            x = block(x, allowed)
        return self.norm(x)

    def see(self, pixels: Tensor) -> Tensor:
        """Cut pictures into patches and embed them."""
        return self.patch(functional.unfold(pixels, PATCH, stride=PATCH).mT)

    def read(self, ids: Tensor, visible: Tensor | None = None) -> Tensor:
        """Embed words, each with the visible one before it: it spares a layer where words are looked up by place."""
        shown = torch.ones_like(ids, dtype=torch.bool) if visible is None else visible
        last = torch.where(shown, torch.arange(1, ids.shape[1] + 1), 0).cummax(1).values  # 0: none yet
        before = functional.pad(ids, (1, 0), value=task.PAD).gather(1, functional.pad(last[:, :-1], (1, 0)))
        return self.words(ids) + self.before(self.words(before))

    @torch.no_grad()
    def sample(self, problems: task.Problems, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Sample completions at temperature 1: ids and mask, each `[B, LENGTH]`."""
        B = len(problems.hint)
        x = torch.cat([self.see(problems.pixels), self.read(problems.prompt_ids)], 1) + self.positions[:PREFIX]
        last = problems.prompt_ids[:, -1]
        allowed = _allowed(PATCHES, PREFIX + task.LENGTH)
        caches: list[list[Tensor]] = [[] for _ in self.blocks]
        ids = torch.full((B, task.LENGTH), task.PAD)
        alive = torch.ones(B, dtype=torch.bool)
        for t in range(task.LENGTH):
            end = PREFIX + t
            for block, cache in zip(self.blocks, caches, strict=True):
                x = block(x, allowed[end - x.shape[1] : end, :end], cache)
            chances = self.head(self.norm(x[:, -1])).softmax(-1)
            token = torch.multinomial(chances, 1, generator=generator).squeeze(1)
            ids[:, t] = torch.where(alive, token, task.PAD)
            alive &= token != task.EOS
            if not alive.any():
                break
            x = self.read(torch.stack([last, token], 1))[:, 1:] + self.positions[end]
            last = token
        ended = (ids == task.EOS).cumsum(1)
        return ids, (ended == 0) | ((ended == 1) & (ids == task.EOS))


def _allowed(patches: int, S: int) -> Tensor:
    """Return which columns `[query, key]` see each other: those before, and image tokens all image tokens."""
    columns = torch.arange(S)
    image = columns < patches
    return (columns[None, :] <= columns[:, None]) | (image[None, :] & image[:, None])


def warm_start(seed: int, p_hint: float, steps: int = WARM_START_STEPS) -> PrefixVLM:
    """Teach a new model the format and the arithmetic, so that log-prob contrasts mean something.

    Each step sees demonstrations, and sums without a picture at a random place: there are 300 of them to learn.
    """
    torch.manual_seed(seed)
    model, generator = PrefixVLM(), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    for step in range(steps):
        rate = min((step + 1) / 40, 1.0) * (1 + math.cos(math.pi * step / steps)) / 2
        optimizer.param_groups[0]["lr"] = WARM_START_LR * rate
        problems = task.draw(DEMONSTRATIONS, generator, held_out=False, p_hint=p_hint)
        loss = _imitation_loss(model, problems, task.demonstrations(problems, generator))
        for words in (task.sums(SUMS, generator), task.lookups(LOOKUPS, generator)):
            first = PREFIX + int(torch.randint(task.LENGTH - words.shape[1], (), generator=generator))
            loss = loss + _last_token_loss(model, words, first)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model


def _imitation_loss(model: PrefixVLM, problems: task.Problems, ids: Tensor) -> Tensor:
    """Return the cross entropy of completions; results, and digits that are taken from the perception, count thrice."""
    states = model.states(problems.pixels, torch.cat([problems.prompt_ids, ids], 1)[:, :-1])
    logits = model.head(states[:, PREFIX - 1 :])
    losses = functional.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="none").view_as(ids)
    told = (ids == task.ID["="]) | (ids == task.ID["is"])
    weights = (ids != task.PAD) + 2.0 * functional.pad(told, (1, 0))[:, :-1]
    return (weights * losses).sum() / weights.sum()


def _last_token_loss(model: PrefixVLM, ids: Tensor, first: int) -> Tensor:
    states = model.run(model.read(ids[:, :-1]), first, _allowed(0, ids.shape[1] - 1))
    return functional.cross_entropy(model.head(states[:, -1]), ids[:, -1])


def warm_started(seed: int, p_hint: float, steps: int = WARM_START_STEPS) -> PrefixVLM:
    """Load the warm start of these settings, or make and keep it."""
    model = PrefixVLM()
    made_by = keep.code(("task.py", "model.py"), library=False)
    name = f"warm start of {seed}, {p_hint}, {steps}"
    model.load_state_dict(keep.kept(made_by, name, lambda: warm_start(seed, p_hint, steps).state_dict()))
    return model
