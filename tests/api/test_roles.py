"""Role parsing against a character-level oracle, on tokenizers that cut tags in every way."""

import gc
import time
import warnings
import weakref
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import run_python
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from srpo import StreamLogps
from srpo.errors import ConfigError, ConfigWarning, DtypeError, RoleParseError, ShapeError
from srpo.roles import Role, RoleGrammar, RoleParse, role_ids_from_completions
from srpo.rollout import credit_rollout

P, R = Role.PERCEPTION, Role.REASONING
FRAGMENTS = [
    *("<perception>", "</perception>", "<Think>", "</think>", "< answer >", "</answer\n>", "<look>", "< / look>"),
    *(
        "<reason>",
        "</reasoning>",
        "<think hard>",
        "<per ception>",
        "<",
        "</",
        ">",
        "<<",
        "think>",
        "é",
        "三",
        "\U0001f600",
    ),
    *(".", "\n\n", " ", " two dogs", "2+1=3", "so", "\ufffd", "perception", "/"),
]
ROLE_OF_TAG = dict.fromkeys(RoleGrammar().perception_tags, P)
ROLE_OF_TAG |= dict.fromkeys((*RoleGrammar().reasoning_tags, *RoleGrammar().answer_tags), R)


# ---- the oracle: one character at a time, no regular expression ----


def tag_at(text: str, start: int) -> tuple[int, str, bool] | None:
    """Return (end, name, closing) of the tag that begins at text[start], if one does."""

    def skip_spaces(index: int) -> int:
        while index < len(text) and text[index] in " \t\r\n\f\v":
            index += 1
        return index

    if text[start] != "<":
        return None
    index = skip_spaces(start + 1)
    closing = text[index : index + 1] == "/"
    index = skip_spaces(index + 1) if closing else index
    name_end = index
    while name_end < len(text) and text[name_end] in "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ":
        name_end += 1
    name, index = text[index:name_end].lower(), skip_spaces(name_end)
    return (index + 1, name, closing) if name in ROLE_OF_TAG and text[index : index + 1] == ">" else None


def oracle(text: str, spans: list[tuple[int, int]], strict: bool = False) -> tuple[list[int], bool]:
    """Return the role of every token span [start, end) of the text, and whether a tag stays open."""
    in_tag = [False] * len(text)
    role_at = [0] * (len(text) + 1)  # role of a character that would be inserted before text[i]
    stack: list[str] = []
    orphan = False
    position = 0
    while position < len(text):
        role_at[position] = ROLE_OF_TAG[stack[-1]] if stack else 0
        tag = tag_at(text, position)
        if tag is None:
            position += 1
            continue
        end, name, closing = tag
        in_tag[position:end] = [True] * (end - position)
        if not closing:
            stack.append(name)
        elif name in stack:
            del stack[len(stack) - 1 - stack[::-1].index(name)]
        else:
            orphan = True
        role_at[position + 1 : end] = [0] * (end - position - 1)
        position = end
    role_at[len(text)] = ROLE_OF_TAG[stack[-1]] if stack else 0
    if strict and (stack or orphan):
        return [0] * len(spans), bool(stack)
    return [0 if any(in_tag[start:end]) else role_at[start] for start, end in spans], bool(stack)


# ---- tokenizers ----


class Pieces:
    """A tokenizer whose ids are indices into a list of strings."""

    def __init__(self, pieces: list[str]) -> None:
        self.pieces = pieces
        self.calls = 0

    def __len__(self) -> int:
        return len(self.pieces)

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool) -> str:
        assert not skip_special_tokens
        assert not clean_up_tokenization_spaces
        self.calls += 1
        return "".join(self.pieces[index] for index in token_ids)


def spell(*pieces: str) -> tuple[torch.Tensor, Pieces]:
    """Return one completion made of these pieces, and its tokenizer."""
    vocabulary = sorted(set(pieces)) or ["x"]
    return torch.tensor([[vocabulary.index(piece) for piece in pieces]], dtype=torch.long), Pieces(vocabulary)


def parse(*pieces: str, **options) -> list[int]:
    ids, tokenizer = spell(*pieces)
    return role_ids_from_completions(ids, tokenizer, **options).role_ids[0].tolist()


CORPUS = [
    "<perception> Two dogs, one cat.</perception>\n\n<think> 2+1=3 so naïve 三.</think>\n<answer> 3.</answer>"
] * 20
QWEN_SPLIT = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")


def byte_level(extra: tuple[str, ...] = ()) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(QWEN_SPLIT, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=340, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens(list(extra))
    return tokenizer


def metaspace() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    spaces = decoders.Replace("▁", " ")
    tokenizer.decoder = decoders.Sequence([spaces, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    in_bytes = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=["<unk>", *in_bytes], show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def word_level(fuse: bool) -> Tokenizer:
    words = ["<unk>", *sorted(set("".join(FRAGMENTS))), "think", "perception", "two", "dogs"]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"think|perception|two|dogs|.|\n"), "isolated")
    if fuse:
        tokenizer.decoder = decoders.Fuse()
    return tokenizer


BUILDERS = {
    "byte_level": byte_level,
    "special_tags": lambda: byte_level(("<perception>", "</perception>", "<Think>", "</think>", "<answer>")),
    "metaspace": metaspace,
    "word_level": lambda: word_level(fuse=True),
    "word_level_without_decoder": lambda: word_level(fuse=False),
}


@cache
def build(name: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=BUILDERS[name]())


# ---- against the oracle ----


@settings(max_examples=300, deadline=None)
@given(
    pieces=st.lists(st.sampled_from(["", *FRAGMENTS, "<pe", "rception", ">a<", "</think><", "x</look>y"]), max_size=40),
    strict=st.booleans(),
)
def test_any_pieces_match_the_oracle(pieces: list[str], strict: bool) -> None:
    ids, tokenizer = spell(*pieces)
    ends = [len("".join(pieces[: index + 1])) for index in range(len(pieces))]
    starts = [0, *ends][: len(pieces)]
    roles, unclosed = oracle("".join(pieces), list(zip(starts, ends, strict=True)), strict)
    result = role_ids_from_completions(ids, tokenizer, grammar=RoleGrammar(strict=strict))
    assert result.role_ids[0].tolist() == roles
    assert result.unclosed.tolist() == [unclosed]
    assert result.parsed.tolist() == [P in roles and R in roles]


@pytest.mark.parametrize("name", BUILDERS)
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_real_tokenizers_match_the_oracle_through_their_offsets(name: str, data: st.DataObject) -> None:
    text = "".join(data.draw(st.lists(st.sampled_from(FRAGMENTS), max_size=20)))
    encoded = build(name)(text, return_offsets_mapping=True, add_special_tokens=False)
    if name == "word_level_without_decoder":
        text = text.replace("<per ception>", "<per.ception>")  # same length: spaces are lost in this tokenizer's decode
    roles, unclosed = oracle(text, encoded["offset_mapping"])
    ids = torch.tensor([encoded["input_ids"]], dtype=torch.long)
    result = role_ids_from_completions(ids, build(name))
    assert result.role_ids[0].tolist() == roles
    assert result.unclosed.tolist() == [unclosed]


@settings(max_examples=100, deadline=None)
@given(
    tokens=st.lists(st.tuples(st.sampled_from(FRAGMENTS), st.booleans()), max_size=30),
    garbage=st.integers(min_value=-(2**62), max_value=2**62),
)
def test_masked_tokens_are_never_read(tokens: list[tuple[str, bool]], garbage: int) -> None:
    ids, tokenizer = spell(*(piece for piece, _ in tokens))
    mask = torch.tensor([[valid for _, valid in tokens]], dtype=torch.bool)
    compact = role_ids_from_completions(ids[mask][None], tokenizer)
    result = role_ids_from_completions(ids.where(mask, garbage), tokenizer, completion_mask=mask)
    assert torch.equal(result.role_ids[mask], compact.role_ids[0])
    assert not result.role_ids[~mask].any()
    assert torch.equal(result.parsed, compact.parsed)
    assert torch.equal(result.unclosed, compact.unclosed)


@settings(max_examples=50, deadline=None)
@given(rows=st.lists(st.lists(st.sampled_from(FRAGMENTS), max_size=12), min_size=1, max_size=5))
def test_rows_are_independent(rows: list[list[str]]) -> None:
    tokenizer = Pieces(FRAGMENTS)
    width = max(map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for row, pieces in enumerate(rows):
        ids[row, : len(pieces)] = torch.tensor([FRAGMENTS.index(piece) for piece in pieces], dtype=torch.long)
        mask[row, : len(pieces)] = True
    batch = role_ids_from_completions(ids, tokenizer, completion_mask=mask)
    for row in range(len(rows)):
        alone = role_ids_from_completions(ids[row : row + 1], tokenizer, completion_mask=mask[row : row + 1])
        assert torch.equal(batch.role_ids[row], alone.role_ids[0])


# ---- the rules, one by one ----


def test_template_response() -> None:
    pieces = [
        "<perception>",
        "two",
        "</perception>",
        " ",
        "<think>",
        "so",
        "</think>",
        "<answer>",
        "2",
        "</answer>",
        ".",
    ]
    ids, tokenizer = spell(*pieces)
    result = role_ids_from_completions(ids, tokenizer)
    assert result.role_ids.tolist() == [[0, P, 0, 0, 0, R, 0, 0, R, 0, 0]]
    assert (result.parsed.tolist(), result.unclosed.tolist()) == ([True], [False])


@pytest.mark.parametrize("name", ROLE_OF_TAG)
def test_every_default_tag(name: str) -> None:
    assert parse(f"<{name}>", "a", f"</{name}>", "b") == [0, ROLE_OF_TAG[name], 0, 0]


@pytest.mark.parametrize("tag", ["<THINK>", "< think>", "<think\n>", "<\tThInK >"])
def test_case_and_inner_whitespace_do_not_matter(tag: str) -> None:
    closing = tag.replace("<", "< /", 1)
    assert parse(tag, "a", closing, "b") == [0, R, 0, 0]


@pytest.mark.parametrize(
    "tag", ["<think hard>", "<thinker>", "<per ception>", "<thin\u212a>", "<rea\u017fon>", "think>", "<>"]
)
def test_lookalikes_are_text(tag: str) -> None:
    assert parse("<look>", "a", tag, "b", "</look>") == [0, P, P, P, 0]


def test_answer_role() -> None:
    pieces = ("<perception>", "a", "</perception>", "<answer>", "b", "</answer>")
    assert parse(*pieces, grammar=RoleGrammar(answer_role=Role.OTHER)) == [0, P, 0, 0, 0, 0]
    assert parse(*pieces, grammar=RoleGrammar(answer_role=P)) == [0, P, 0, 0, P, 0]


def test_innermost_open_tag_wins_and_spans_of_a_role_are_united() -> None:
    assert parse("<think>", "a", "<look>", "b", "</look>", "c", "</think>", "<see>", "d", "</see>") == [
        *(0, R, 0, P, 0, R, 0),
        *(0, P, 0),
    ]


def test_a_closing_tag_closes_only_the_nearest_of_its_name() -> None:
    crossed = ("<perception>", "a", "<think>", "b", "</perception>", "c", "</think>", "d")
    assert parse(*crossed) == [0, P, 0, R, 0, R, 0, 0]
    twice = ("<look>", "<think>", "<look>", "a", "</look>", "b", "</think>", "c", "</look>", "d")
    assert parse(*twice) == [0, 0, 0, P, 0, R, 0, P, 0, 0]


@pytest.mark.parametrize(
    ("pieces", "roles", "unclosed"),
    [
        (("<think>", "a", "b"), [0, R, R], True),
        (("a", "</think>", "<look>", "b", "</look>"), [0, 0, 0, P, 0], False),
        (("<look>", "a", "</look>", "<think>", "b"), [0, P, 0, 0, R], True),
    ],
)
def test_unclosed_and_orphan_tags(pieces: tuple[str, ...], roles: list[int], unclosed: bool) -> None:
    ids, tokenizer = spell(*pieces)
    lenient = role_ids_from_completions(ids, tokenizer)
    assert lenient.role_ids[0].tolist() == roles
    assert lenient.unclosed.tolist() == [unclosed]
    strict = role_ids_from_completions(ids, tokenizer, grammar=RoleGrammar(strict=True))
    assert not strict.role_ids.any()
    assert strict.parsed.tolist() == [False]
    assert strict.unclosed.tolist() == [unclosed]


def test_unclosed_span_ends_at_the_last_valid_token() -> None:
    ids, tokenizer = spell("<look>", "a", "b", "pad", "pad")
    result = role_ids_from_completions(ids, tokenizer, completion_mask=torch.tensor([[1, 1, 1, 0, 0]]))
    assert result.role_ids.tolist() == [[0, P, P, 0, 0]]


def test_tags_in_tool_output_do_not_count() -> None:
    ids, tokenizer = spell("<think>", "a", "</think>", "<look>", "b", "c", "</think>")
    mask = torch.tensor([[1, 1, 0, 0, 0, 1, 1]])
    result = role_ids_from_completions(ids, tokenizer, completion_mask=mask)
    assert result.role_ids.tolist() == [[0, R, 0, 0, 0, R, 0]]


def test_custom_names_are_literal() -> None:
    grammar = RoleGrammar(perception_tags=("obs.1",), reasoning_tags=("r",), answer_tags=())
    assert parse("<obs.1>", "a", "</obs.1>", "<obsx1>", "b", "<r>", "c", grammar=grammar) == [0, P, 0, 0, 0, 0, R]


# ---- tokenizers that cut tags badly ----


def roles_by_piece(name: str, text: str) -> list[tuple[str, int]]:
    tokenizer = build(name)
    ids = tokenizer.encode(text, add_special_tokens=False)
    roles = role_ids_from_completions(torch.tensor([ids]), tokenizer).role_ids[0].tolist()
    return list(zip(tokenizer.convert_ids_to_tokens(ids), roles, strict=True))


def test_tokens_merged_with_a_tag_belong_to_the_tag() -> None:
    labelled = roles_by_piece("byte_level", CORPUS[0])
    merged = [role for piece, role in labelled if piece in (".</", ">ĊĊ", ">Ċ")]
    assert len(merged) == 5
    assert not any(merged)
    assert ("Ġdogs", P) in labelled
    assert ("Ġso", R) in labelled


def test_split_multibyte_characters_keep_the_offsets() -> None:
    labelled = roles_by_piece("byte_level", "<perception>ΩΩ\U0001f600</perception>Ω<think>Ω</think>")
    letters = [role for piece, role in labelled if not piece.isascii()]
    assert letters == [P] * 8 + [0] * 2 + [R] * 2


def test_byte_fallback_spells_tags_and_letters() -> None:
    tokenizer = build("metaspace")
    as_bytes = [tokenizer.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in "<look>Ω</look>Ω".encode()]
    result = role_ids_from_completions(torch.tensor([as_bytes]), tokenizer)
    assert result.role_ids[0].tolist() == [0] * 6 + [P] * 2 + [0] * 7 + [0] * 2


def test_leading_space_of_a_metaspace_piece_counts() -> None:
    tokenizer = build("metaspace")
    ids = tokenizer.encode("<per ception>a", add_special_tokens=False)
    assert not role_ids_from_completions(torch.tensor([ids]), tokenizer).unclosed.any()


def test_a_tag_as_one_special_token() -> None:
    labelled = roles_by_piece("special_tags", "<perception>a</perception><Think>b")
    assert labelled == [("<perception>", 0), ("a", P), ("</perception>", 0), ("<Think>", 0), ("b", R)]


# ---- the piece table ----


def test_second_call_decodes_nothing() -> None:
    ids, tokenizer = spell("<think>", "a", "</think>")
    role_ids_from_completions(ids, tokenizer)
    before = tokenizer.calls
    role_ids_from_completions(ids.repeat(3, 5), tokenizer)
    assert tokenizer.calls == before


def test_grown_tokenizer_is_read_again() -> None:
    tokenizer = Pieces(["<think>", "a"])
    ids = torch.tensor([[0, 1]])
    assert role_ids_from_completions(ids, tokenizer).role_ids.tolist() == [[0, R]]
    tokenizer.pieces = ["<look>", "a", "b"]
    assert role_ids_from_completions(ids, tokenizer).role_ids.tolist() == [[0, P]]


def test_the_table_does_not_keep_a_tokenizer_alive() -> None:
    ids, tokenizer = spell("<think>", "a")
    role_ids_from_completions(ids, tokenizer)
    alive = weakref.ref(tokenizer)
    del tokenizer
    gc.collect()
    assert alive() is None


def test_tokenizer_without_weak_references_works() -> None:
    class Slotted(Pieces):
        __slots__ = ()
        __hash__ = None  # type: ignore[assignment]

    assert role_ids_from_completions(torch.tensor([[0, 1]]), Slotted(["<look>", "a"])).role_ids.tolist() == [[0, P]]


def test_vocabulary_with_holes_is_not_cut_at_its_length() -> None:
    class Holed(Pieces):
        def __len__(self) -> int:
            return 2

        def get_vocab(self) -> dict[str, int]:
            return {"<look>": 0, "a": 2}

    tokenizer = Holed(["<look>", "", "a"])
    assert role_ids_from_completions(torch.tensor([[0, 2]]), tokenizer).role_ids.tolist() == [[0, P]]


@pytest.mark.parametrize("name", ["byte_level", "metaspace"])
def test_a_large_batch_takes_well_under_a_second(name: str) -> None:
    tokenizer = build(name)
    ids = torch.tensor(tokenizer.encode(" ".join(CORPUS), add_special_tokens=False))
    batch = ids.repeat(64 * 2048 // len(ids) + 1)[: 64 * 2048].view(64, 2048)
    assert role_ids_from_completions(batch, tokenizer).parsed.all()
    start = time.process_time()
    role_ids_from_completions(batch, tokenizer)
    assert time.process_time() - start < 0.8


@pytest.mark.parametrize(
    "pieces",
    [
        ["<" + " " * 30_000] * 4,
        ["< / " + "\n" * 30_000] * 4,
        ["<think" + " " * 30_000] * 4,
        ["<think>"] * 20_000 + ["</look>"] * 20_000,
        ["<look>"] + ["<think>"] * 20_000 + ["</look>", "<look>"] * 20_000,
    ],
    ids=["open", "close", "name", "deep", "buried"],
)
def test_hostile_text_takes_linear_time(pieces: list[str]) -> None:
    ids, tokenizer = spell(*pieces)
    start = time.process_time()
    role_ids_from_completions(ids, tokenizer)
    assert time.process_time() - start < 2.0


def test_ids_beyond_the_tokenizer_have_no_text() -> None:
    """A padded vocabulary has rows that no tokenizer knows; a model may sample them, also inside of a tag."""
    pieces = Pieces(["<lo", "ok>", "a", "</look>"])
    ids, mask = torch.tensor([[9, 0, 4, 1, 2, 2**40, 2, 3, 4, -100]]), torch.tensor([[1] * 9 + [0]])
    result = role_ids_from_completions(ids, pieces, completion_mask=mask)
    assert result.role_ids.tolist() == [[0, 0, 0, 0, P, 0, P, 0, 0, 0]]


# ---- shapes, dtypes and errors ----


@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (3, 0)])
def test_empty_batches(shape: tuple[int, int]) -> None:
    result = role_ids_from_completions(torch.zeros(shape, dtype=torch.long), Pieces(["a"]))
    assert result.role_ids.shape == shape
    assert result.role_ids.dtype == torch.int8
    assert result.parsed.tolist() == result.unclosed.tolist() == [False] * shape[0]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.int64, torch.float32])
def test_dtypes_and_strides(dtype: torch.dtype, mask_dtype: torch.dtype) -> None:
    ids = torch.tensor([[0, 1], [1, 0], [1, 1]], dtype=dtype).T
    result = role_ids_from_completions(ids, Pieces(["<look>", "a"]), completion_mask=torch.ones(2, 3, dtype=mask_dtype))
    assert isinstance(result, RoleParse)
    assert result.role_ids.tolist() == [[0, P, P], [0, 0, P]]
    assert (result.role_ids.dtype, result.parsed.dtype, result.unclosed.dtype) == (torch.int8, torch.bool, torch.bool)


IDS = torch.zeros(2, 3, dtype=torch.long)


@pytest.mark.parametrize(
    ("error", "builtin", "argument", "ids", "mask"),
    [
        (ShapeError, ValueError, "completion_ids", IDS[0], None),
        (ShapeError, ValueError, "completion_ids", IDS[None], None),
        (DtypeError, TypeError, "completion_ids", IDS.float(), None),
        (DtypeError, TypeError, "completion_ids", IDS.bool(), None),
        (DtypeError, TypeError, "completion_ids", [[0, 1]], None),
        (RoleParseError, ValueError, "completion_ids", IDS - 1, None),
        (ShapeError, ValueError, "completion_mask", IDS, IDS[:, :2]),
        (ShapeError, ValueError, "completion_mask", IDS, IDS[:1]),
        (DtypeError, TypeError, "completion_mask", IDS, [[1, 1, 1]]),
        (RoleParseError, ValueError, "completion_mask", IDS, IDS + 2),
        (RoleParseError, ValueError, "completion_mask", IDS, IDS * float("nan")),
    ],
)
def test_bad_tensors(error: type, builtin: type, argument: str, ids: torch.Tensor, mask: torch.Tensor | None) -> None:
    with pytest.raises(error, match=rf"role_ids_from_completions\(\): {argument} got .*, expected .*; ") as caught:
        role_ids_from_completions(ids, Pieces(["a", "b"]), completion_mask=mask)
    assert isinstance(caught.value, builtin)


def test_bad_tokenizer() -> None:
    with pytest.raises(RoleParseError, match=r"tokenizer got object.*processor\.tokenizer"):
        role_ids_from_completions(IDS, object())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "fields",
    [
        {"perception_tags": ()},
        {"reasoning_tags": ()},
        {"perception_tags": ("",)},
        {"perception_tags": "look"},
        {"reasoning_tags": ["think"]},
        {"reasoning_tags": ("think", 3)},
        {"reasoning_tags": ("think", "Think")},
        {"reasoning_tags": ("think", "look")},
        {"answer_tags": ("think",)},
        {"answer_tags": ("<answer>",)},
        {"answer_tags": ("/answer",)},
        {"answer_tags": ("my answer",)},
        {"answer_tags": ("ré ponse",)},
        {"form": "xml"},
        {"opens_with": "thought"},
        {"opens_with": ""},
        {"opens_with": 2},
        {"answer_role": 2},
        {"strict": 1},
    ],
)
def test_bad_grammar(fields: dict) -> None:
    with pytest.raises(ConfigError, match=rf"RoleGrammar\(\): {next(iter(fields))} got .*, expected .*; "):
        RoleGrammar(**fields)


def test_parsing_roles_does_not_load_transformers() -> None:
    code = "import sys, srpo.roles; sys.exit(any(name in sys.modules for name in ('transformers', 'tokenizers')))"
    assert run_python("-c", code).returncode == 0


# ---- other forms of marks ----


class Letters:
    """One token a character."""

    def __len__(self) -> int:
        return 0x8000

    def decode(self, ids: list[int], **_: object) -> str:
        return "".join(map(chr, ids))


def letters(role_parse: RoleParse, text: str, row: int = 0) -> dict[Role, str]:
    """The text of each role."""
    roles = role_parse.role_ids[row].tolist()
    return {role: "".join(c for c, r in zip(text, roles, strict=False) if r == role) for role in (P, R)}


def parse_text(text: str, **grammar) -> RoleParse:
    return role_ids_from_completions(
        torch.tensor([[ord(c) for c in text]]).long(), Letters(), grammar=RoleGrammar(**grammar)
    )


@pytest.mark.parametrize(
    ("text", "grammar", "perception", "reasoning"),
    [
        ("<see id=\"1\" kind='a b'>cat</see><think n = 2>so</think>", {}, "cat", "so"),
        ("<see the cat><think>so</think>", {}, "", "so"),  # words are no attributes
        ("<see a=>cat</see>", {}, "", ""),
        ("[see]cat[/see] [Think]so[/think]", {"form": "brackets"}, "cat", "so"),
        ("<see>cat</see>", {"form": "brackets"}, "", ""),
        ("[see]cat[/see]", {}, "", ""),
        ("Perception: a cat\nReasoning: so", {"form": "headings"}, " a cat\n", " so"),
        ("## Perception\na cat\n**Reasoning:** so\n", {"form": "headings"}, "\na cat\n", " so\n"),
        ("*Perception*: a cat\n__reasoning__ : so", {"form": "headings"}, " a cat\n", " so"),
        ("my perception: a cat\nReasoning so", {"form": "headings"}, "", ""),  # not at the start; no colon
        ("Perceptions: cats", {"form": "headings"}, "", ""),
        ("so</think><see>cat</see>", {"opens_with": "think"}, "cat", "so"),
        ("\n<Think>so</think><see>cat</see>", {"opens_with": "think"}, "cat", "so"),  # opened once
        ("a cat\nReasoning: so", {"form": "headings", "opens_with": "perception"}, "a cat\n", " so"),
        ("<感知>猫</感知><Élan>so</éLAN>", {"perception_tags": ("感知",), "reasoning_tags": ("élan",)}, "猫", "so"),
        ("<thin\u212a>so</thin\u212a>", {}, "", ""),  # a Kelvin sign is no k
    ],
)
def test_forms(text: str, grammar: dict, perception: str, reasoning: str) -> None:
    found = parse_text(text, **grammar)
    assert letters(found, text) == {P: perception, R: reasoning}
    assert found.parsed.tolist() == [bool(perception and reasoning)]


@pytest.mark.parametrize(
    ("text", "grammar", "unclosed", "stray"),
    [
        ("<see>cat</see><think>so", {}, True, False),
        ("<see>cat</see>so</think>", {}, False, True),
        ("<see>cat</think>", {}, True, True),
        ("so", {"opens_with": "think"}, True, False),
        ("", {"opens_with": "think"}, False, False),
        ("so</think>", {"opens_with": "think"}, False, False),
        ("Reasoning: so", {"form": "headings"}, False, False),
    ],
)
def test_truncated_and_stray(text: str, grammar: dict, unclosed: bool, stray: bool) -> None:
    found = parse_text(text, **grammar)
    assert (found.unclosed.tolist(), found.stray.tolist()) == ([unclosed], [stray])


@pytest.mark.parametrize("form", ["tags", "brackets", "headings"])
def test_hostile_marks_take_linear_time(form: str) -> None:
    grammar = RoleGrammar(form=form)
    for unit in ("<see a=", "[see a=", "<see a='", "# ", "**", "\n# see", "<see  a  =  b  "):
        start = time.thread_time()
        role_ids_from_completions(torch.tensor([[ord(c) for c in unit * 20_000]]), Letters(), grammar=grammar)
        assert time.thread_time() - start < 20


# ---- roles that never parse ----


def rollout_of(*texts: str) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, texts))
    ids = torch.tensor([[ord(c) for c in text.ljust(width, "\0")] for text in texts])
    return ids, ids != 0


def credited(tokenizer: Letters, *texts: str, **named):
    ids, mask = rollout_of(*texts)
    nothing = torch.zeros(ids.shape)
    return credit_rollout(
        ids, torch.ones(len(texts)), tokenizer, lambda role_ids, _: StreamLogps(nothing, nothing, nothing, nothing),
        completion_mask=mask, **named,
    )  # fmt: skip


def test_roles_that_never_parse_are_said_once() -> None:
    tokenizer = Letters()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        credited(tokenizer, "Perception: a cat", "x")
        credited(tokenizer, "Perception: a cat", "x")
    with pytest.warns(ConfigWarning, match=r"first 3 rollouts.*'Perception: a cat'.*role_grammar.*opens_with"):
        found = credited(tokenizer, "Perception: a cat", "x")
    assert found.metrics["srpo/parse_failures"] == 1.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(4):
            credited(tokenizer, "Perception: a cat")


def test_one_completion_that_parses_is_enough() -> None:
    tokenizer = Letters()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        credited(tokenizer, "<see>cat</see><think>so</think>", "x")
        for _ in range(4):
            credited(tokenizer, "x")


def test_a_role_function_in_the_place_of_the_grammar() -> None:
    seen = []

    def halves(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        seen.append(mask)
        return torch.where(torch.arange(ids.shape[1]) < 2, 1, 2) * mask

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(4):
            found = credited(Letters(), "abcd", "ab", role_func=halves)
    assert seen[0].tolist() == [[True] * 4, [True, True, False, False]]
    assert found.roles.role_ids.tolist() == [[1, 1, 2, 2], [1, 1, 0, 0]]
    assert found.metrics["srpo/parse_failures"] == 0.5
    with pytest.raises(ShapeError, match=r"what role_func returns got int64\[1, 2\]"):
        credited(Letters(), "abcd", role_func=lambda ids, mask: ids[:, :2])
    with pytest.raises(DtypeError, match="what role_func returns got list"):
        credited(Letters(), "abcd", role_func=lambda ids, mask: ids.tolist())
    with pytest.raises(ConfigError, match="role_func got int 3"):
        credited(Letters(), "abcd", role_func=3)


def test_metrics_of_marks() -> None:
    found = credited(Letters(), "<see>cat</see><think>so", "cat</see>", "<see>cat</see><think>so</think>").metrics
    assert found["srpo/unclosed"] == found["srpo/stray"] == pytest.approx(1 / 3)
