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
  open(decodeURI(location.hash.slice(1)));
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

addEventListener("hashchange", fromAddress);
fromAddress();
