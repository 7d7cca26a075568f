"use strict";
(() => {
  const filters = [...document.querySelectorAll(".filter")];
  const search = document.getElementById("search");
  const clauses = [...document.querySelectorAll(".clause")];
  let status = "";

  const show = () => {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    for (const clause of clauses) {
      const fits = !status || clause.dataset.status === status;
      clause.hidden = !(fits && words.every((word) => clause.dataset.words.includes(word)));
    }
    for (const family of document.querySelectorAll(".family")) {
      family.hidden = !family.querySelector(".clause:not([hidden])");
    }
    document.querySelector(".nothing").hidden = clauses.some((clause) => !clause.hidden);
  };

  for (const filter of filters) {
    filter.addEventListener("click", () => {
      status = filter.dataset.status;
      for (const other of filters) other.setAttribute("aria-pressed", String(other === filter));
      show();
    });
  }
  search.addEventListener("input", show);

  for (const button of document.querySelectorAll(".copy")) {
    button.addEventListener("click", async () => {
      const code = button.closest("figure").querySelector("code");
      try {
        await navigator.clipboard.writeText(code.textContent);
        button.textContent = "Copied";
      } catch {
        // Without the clipboard, as in a file that was opened from a disk: select it instead.
        getSelection().selectAllChildren(code);
        button.textContent = "Selected";
      }
      setTimeout(() => { button.textContent = "Copy"; }, 1500);
    });
  }
})();
