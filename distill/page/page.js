"use strict";
// Builds the token views from the data of the page, and shows what the teacher expected: on hover, tap and by keyboard.
const data = JSON.parse(document.getElementById("data").textContent);
const tip = document.getElementById("tip");
let shown = null, shownTop = 0;

function part(kind, name, text) {
  const element = document.createElement(kind);
  if (name) element.className = name;
  if (text !== undefined) element.textContent = text;
  return element;
}

function percent(p) {
  return p === null ? "drawn" : p >= 0.0995 ? (100 * p).toFixed(0) + "%" : p >= 0.001 ? (100 * p).toFixed(1) + "%" : "<0.1%";
}

function bars(expected, own) {
  const grid = part("div", "bars");
  for (const [word, p] of expected) {
    grid.append(part("span", word === own ? "word true" : "word", data.words[word]));
    const bar = part("span", "bar");
    bar.style.width = p === null ? "0" : Math.max(1, 100 * p) + "%";
    grid.append(bar, part("span", "num", percent(p)));
  }
  return grid;
}

function show(span) {
  hide();
  const [, loss, off, expected, own] = span.token;
  const head = part("div");
  head.append(part("b", "", data.words[own]));
  if (loss !== null) head.append(" · the teacher gave it " + percent(Math.exp(-loss)) + ", " + loss.toFixed(2) + " nats");
  if (off) head.append(part("div", "said-by", "not trained on"));
  tip.replaceChildren(head);
  if (expected && !expected.length) tip.append(part("div", "said-by", "the store does not say what it expected"));
  else if (expected) tip.append(part("div", "said-by", "it expected"), bars(expected, own));
  else tip.append(part("div", "said-by", "the first token follows nothing"));
  tip.hidden = false;
  const box = span.getClientRects()[0] || span.getBoundingClientRect();
  const size = tip.getBoundingClientRect();
  const below = box.bottom + 6 + size.height < innerHeight;
  tip.style.left = Math.max(8, Math.min(box.left, innerWidth - size.width - 8)) + "px";
  tip.style.top = Math.max(8, below ? box.bottom + 6 : box.top - 6 - size.height) + "px";
  span.classList.add("on");
  span.setAttribute("aria-describedby", "tip");
  shown = span;
  shownTop = box.top;
}

function hide() {
  tip.hidden = true;
  if (shown) { shown.classList.remove("on"); shown.removeAttribute("aria-describedby"); }
  shown = null;
}

function view(place, tokens) {
  for (const token of tokens) {
    const [text, loss, off] = token;
    const span = part("span", "t" + (off ? " off" : "") + (text ? "" : " part"));
    const seen = text.replace(/[\u202a-\u202e\u2066-\u2069]/g, "�");  // they would reorder what is read
    span.textContent = seen === "" ? "·" : /^\n+$/.test(seen) ? "⏎".repeat(seen.length) + seen : seen;
    if (loss !== null && !off) span.style.setProperty("--s", Math.min(1, loss / 8).toFixed(2));
    span.token = token;
    span.tabIndex = place.children.length ? -1 : 0;
    place.append(span);
  }
  const of = (event) => event.target.closest(".t");
  place.addEventListener("pointerover", (event) => { if (event.pointerType === "mouse" && of(event)) show(of(event)); });
  place.addEventListener("pointerout", (event) => { if (event.pointerType === "mouse") hide(); });
  place.addEventListener("click", (event) => { if (of(event)) { of(event).focus(); show(of(event)); } else hide(); });
  place.addEventListener("focusin", (event) => {
    for (const span of place.querySelectorAll('[tabindex="0"]')) span.tabIndex = -1;
    of(event).tabIndex = 0;
    show(of(event));
  });
  place.addEventListener("focusout", hide);
  place.addEventListener("keydown", (event) => {
    const here = of(event);
    const next = { ArrowRight: here.nextElementSibling, ArrowLeft: here.previousElementSibling,
                   Home: place.firstElementChild, End: place.lastElementChild }[event.key];
    if (event.key === "Escape") hide();
    if (next) { event.preventDefault(); next.focus(); }
  });
}

for (const place of document.querySelectorAll("[data-sample]")) view(place, data.samples[place.dataset.sample]);
for (const place of document.querySelectorAll("[data-bars]")) {
  const [expected, own] = data.bars[place.dataset.bars];
  place.append(bars(expected, own));
}
addEventListener("scroll", () => {  // the event may come late: what counts is whether the token has moved
  if (!shown || document.activeElement === shown) return;
  const box = shown.getClientRects()[0];
  if (!box || Math.abs(box.top - shownTop) > 4) hide();
}, { passive: true });
