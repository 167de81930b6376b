"use strict";

// A panel opens from its button, or from the address behind a "#", so that a number can be linked to.
function open(id) {
  const panel = document.getElementById(id);
  if (!(panel instanceof HTMLDialogElement) || panel.open) return;
  panel.showModal();
  panel.scrollTop = 0;
  history.replaceState(null, "", "#" + encodeURI(id));
}

function fromAddress() {
  const id = decodeURI(location.hash.slice(1));
  const target = document.getElementById(id);
  if (target?.closest("[hidden]")) reset(); // it was filtered away
  open(id);
}

for (const button of document.querySelectorAll("[data-opens]")) {
  button.addEventListener("click", () => open(button.dataset.opens));
}

for (const panel of document.querySelectorAll("dialog")) {
  panel.addEventListener("click", (event) => {
    // On the backdrop, on its button, or on a link that leads out of it.
    if (event.target === panel || event.target.closest(".close, a")) panel.close();
  });
  panel.addEventListener("close", () => {
    if (decodeURI(location.hash.slice(1)) === panel.id) history.replaceState(null, "", "#");
  });
}

for (const button of document.querySelectorAll(".command button")) {
  button.addEventListener("click", async () => {
    const command = button.previousElementSibling;
    try {
      await navigator.clipboard.writeText(command.textContent);
      button.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(command); // not allowed here: all that is left is Ctrl+C
      button.textContent = "Selected";
    }
    setTimeout(() => (button.textContent = "Copy"), 1500);
  });
}

// Ascending, descending, and back to the order of the paper; what has no number stays last.
function compareKeys(a, b, sign) {
  if (a === "" || b === "") return (a === "") - (b === "");
  const difference = Number(a) - Number(b);
  return sign * (Number.isNaN(difference) ? a.localeCompare(b) : difference);
}

for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  const printed = [...body.rows];
  const heads = [...table.querySelectorAll("th[aria-sort]")];
  heads.forEach((head, column) => {
    head.querySelector("button").addEventListener("click", () => {
      const order = { none: "ascending", ascending: "descending", descending: "none" }[head.getAttribute("aria-sort")];
      for (const other of heads) other.setAttribute("aria-sort", "none");
      head.setAttribute("aria-sort", order);
      table.classList.toggle("sorted", order !== "none");
      const rows = [...printed];
      if (order !== "none") {
        const sign = order === "ascending" ? 1 : -1;
        rows.sort((a, b) => compareKeys(a.cells[column].dataset.sort, b.cells[column].dataset.sort, sign));
      }
      body.append(...rows);
    });
  });
}

// The search field and the verdicts choose what is shown: rows of tables, curves of figures, departures and notes. What
// has to match is an item with the title above it, and the commands, runs and commits in the panels that it opens.
const items = [
  ...document.querySelectorAll("table:is(.numbers, .methods) tbody tr, .openers > button, .departures tbody tr, #notes details"),
];
const texts = new Map();
const search = document.getElementById("search");
const found = document.getElementById("found");
const showAll = document.getElementById("show-all");
const tiles = [...document.querySelectorAll("[data-filter]")];
const openers = [...document.querySelectorAll("main [data-opens]")];

function searchable(item) {
  if (!texts.has(item)) {
    const title = item.closest("article")?.querySelector("h3");
    const buttons = item.matches("[data-opens]") ? [item] : [...item.querySelectorAll("[data-opens]")];
    const evidence = buttons.flatMap((button) => [
      button.dataset.opens,
      ...[...document.getElementById(button.dataset.opens).querySelectorAll(".command code, td")],
    ]);
    const parts = [title, item, ...evidence].map((part) => part?.textContent ?? part ?? "");
    texts.set(item, parts.join(" ").toLowerCase());
  }
  return texts.get(item);
}

function matches(item, words, verdict) {
  const judged = `[data-verdict="${verdict}"]`;
  return (!verdict || item.matches(judged) || item.querySelector(judged) !== null)
    && (!words.length || words.every((word) => searchable(item).includes(word)));
}

// A row has numbers of several verdicts, so the numbers are counted and not the rows.
function judgedText(verdict) {
  const judged = openers.filter((opener) => opener.dataset.verdict === verdict && !opener.closest("[hidden]"));
  const things = judged.length === 1 ? "number or curve" : "numbers and curves";
  return `${judged.length} ${things}, also of figures and later papers`;
}

function filter() {
  const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
  const verdict = tiles.find((tile) => tile.getAttribute("aria-pressed") === "true")?.dataset.filter;
  const isFiltered = words.length > 0 || verdict !== undefined;
  let count = 0;
  for (const item of items) {
    item.hidden = isFiltered && !matches(item, words, verdict);
    count += !item.hidden;
  }
  for (const opener of openers) opener.classList.toggle("faded", verdict !== undefined && opener.dataset.verdict !== verdict);
  // An article whose items are all hidden is hidden too, and so is its section.
  for (const kind of ["article", "main > section"]) {
    for (const part of document.querySelectorAll(kind)) {
      part.hidden = isFiltered && !items.some((item) => !item.hidden && part.contains(item));
    }
  }
  found.textContent = isFiltered ? (verdict ? judgedText(verdict) : `${count} of ${items.length} entries`) : "";
  showAll.hidden = !isFiltered;
}

for (const tile of tiles) {
  tile.addEventListener("click", () => {
    const pressed = tile.getAttribute("aria-pressed") !== "true";
    for (const other of tiles) other.setAttribute("aria-pressed", String(other === tile && pressed));
    filter();
  });
}
search.addEventListener("input", filter);
function reset() {
  search.value = "";
  for (const tile of tiles) tile.setAttribute("aria-pressed", "false");
  filter();
}
showAll.addEventListener("click", () => {
  reset();
  search.focus();
});

// A box says that it scrolls sideways where it does; boxes in closed panels have no size until they open.
const sizes = new ResizeObserver((entries) => {
  for (const { target } of entries) {
    target.previousElementSibling.hidden = target.scrollWidth <= target.clientWidth + 1;
  }
});
for (const box of document.querySelectorAll(".scroll")) sizes.observe(box);

addEventListener("hashchange", fromAddress);
fromAddress();
