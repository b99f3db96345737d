"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const tip = document.getElementById("tip");
  const roles = ["other", "perception", "reasoning"];
  let at = null, flat = false;

  const shown = (x, digits, signed) => {
    if (x === null || x === undefined) return "\u2013";
    if (typeof x === "string") return x; // infinite
    const text = Math.abs(x).toFixed(digits);
    const sign = x < 0 && Number(text) !== 0 ? "\u2212" : signed ? "+" : "";
    return sign + text;
  };

  const facts = (rollout, i) => {
    const value = (name) => (rollout[name] ? rollout[name][i] : undefined);
    const weight = rollout.weights[i];
    const own = Array.isArray(rollout.advantage) ? rollout.advantage[i] : rollout.advantage;
    const sampled = !rollout.sampled || rollout.sampled[i] === 1;
    const used = sampled ? (flat ? 1 : weight) : 0;
    const rows = sampled ? [] : [["not sampled", "no credit"]];
    if (rollout.roles) rows.push(["role", roles[rollout.roles[i]]]);
    if (rollout.contrast) rows.push(["contrast, nats", shown(value("contrast"), 3, true)]);
    if (rollout.logps) rows.push(["log-prob", shown(value("logps"), 3)]);
    if (rollout.corrupted_logps) rows.push(["log-prob, picture corrupted", shown(value("corrupted_logps"), 3)]);
    if (rollout.ablated_logps) rows.push(["log-prob, perception hidden", shown(value("ablated_logps"), 3)]);
    rows.push(["weight", shown(used, 3)]);
    if (typeof own === "number") rows.push(["advantage", shown(own * used, 3, true)]);
    return rows;
  };

  const show = (token) => {
    if (at) at.classList.remove("at");
    at = token;
    if (!token) { tip.hidden = true; return; }
    token.classList.add("at");
    const box = token.parentElement;
    const rollout = data[Number(box.dataset.rollout)];
    const i = Array.prototype.indexOf.call(box.children, token);
    const list = document.createElement("dl");
    for (const [name, value] of facts(rollout, i)) {
      const term = document.createElement("dt"), detail = document.createElement("dd");
      term.textContent = name;
      detail.textContent = value;
      list.append(term, detail);
    }
    const text = document.createElement("code");
    text.textContent = token.textContent.slice(0, 120) || "(a part of a character)";
    if (token.classList.contains("n")) text.textContent = token.textContent.replace(/\n/g, "\u21b5");
    const head = document.createElement("div");
    head.append(text, ` \u00b7 token ${i + 1} of ${box.children.length}`);
    tip.replaceChildren(head, list);
    tip.hidden = false;
    const rect = token.getClientRects()[0] || token.getBoundingClientRect();
    const left = Math.max(8, Math.min(rect.left, innerWidth - tip.offsetWidth - 8));
    const below = rect.bottom + 8 + tip.offsetHeight < innerHeight;
    tip.style.left = `${left}px`;
    tip.style.top = `${Math.max(8, below ? rect.bottom + 8 : rect.top - tip.offsetHeight - 8)}px`;
  };

  const tokenOf = (node) => {
    const token = node instanceof Element ? node.closest(".tokens > span") : null;
    return token && token.parentElement.dataset.rollout !== undefined ? token : null;
  };
  const go = (token) => { token.tabIndex = -1; token.focus(); };

  document.addEventListener("pointerover", (event) => {
    const token = tokenOf(event.target);
    if (token !== at) show(token || tokenOf(document.activeElement));
  });
  document.addEventListener("focusin", (event) => show(tokenOf(event.target)));
  document.addEventListener("click", (event) => { const token = tokenOf(event.target); if (token) go(token); });
  document.addEventListener("scroll", () => { if (at) show(at === tokenOf(document.activeElement) ? at : null); }, { passive: true });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") { show(null); return; }
    const box = event.target instanceof Element ? event.target.closest(".tokens") : null;
    if (!box) return;
    const token = tokenOf(event.target);
    const next = {
      ArrowRight: () => (token ? token.nextElementSibling : box.firstElementChild),
      ArrowLeft: () => (token ? token.previousElementSibling : box.lastElementChild),
      Home: () => box.firstElementChild, End: () => box.lastElementChild,
    }[event.key];
    if (!next) return;
    event.preventDefault();
    const target = next();
    if (target) go(target);
  });
  document.addEventListener("change", (event) => {
    if (event.target.name !== "method") return;
    flat = event.target.value === "grpo";
    document.body.classList.toggle("flat", flat);
    if (at) show(at);
  });
})();
