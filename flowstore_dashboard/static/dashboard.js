// Keeps a page current: the server sends the version of its content, and the page is requested again when
// it differs. Only the regions of the page are replaced, so forms, the scroll position and the focus stay.
"use strict";

(() => {
  const address = document.body.dataset.live;
  const indicator = document.getElementById("live");
  if (!address || !indicator || !window.EventSource) return;

  let shown = null;
  let wanted = null;
  let isLoading = false;

  const say = (text, state) => {
    if (indicator.textContent === text) return;
    indicator.hidden = false;
    indicator.textContent = text;
    indicator.dataset.state = state;
  };

  const hasSelection = (region) => {
    const selection = window.getSelection();
    return selection && !selection.isCollapsed && region.contains(selection.anchorNode);
  };

  const pathTo = (region, element) => {
    const path = [];
    for (let one = element; one !== region; one = one.parentElement) {
      path.unshift([...one.parentElement.children].indexOf(one));
    }
    return path;
  };

  const replace = (region, fresh) => {
    const open = new Map();
    for (const one of region.querySelectorAll("details")) {
      open.set(keyOf(one, region), one.open);
    }
    const focused = region.contains(document.activeElement) ? document.activeElement : null;
    const path = focused && focused !== region ? pathTo(region, focused) : null;
    region.replaceChildren(...fresh.childNodes);
    for (const one of region.querySelectorAll("details")) {
      const was = open.get(keyOf(one, region));
      if (was !== undefined) one.open = was;
    }
    if (path) {
      const again = path.reduce((one, place) => one && one.children[place], region);
      if (again) again.focus({ preventScroll: true });
    }
  };

  const keyOf = (details, region) => {
    const outer = details.closest("details[id]");
    const summary = details.querySelector("summary");
    const label = summary ? summary.firstChild.textContent.trim() : "";
    return details.id || `${outer ? outer.id : region.dataset.region} ${label}`;
  };

  // The browser takes an element that was replaced for no target any more, so the target gets a class too.
  const markTarget = () => {
    const target = location.hash.startsWith("#step-") && document.getElementById(location.hash.slice(1));
    for (const one of document.querySelectorAll(".is-target")) {
      if (one !== target) one.classList.remove("is-target");
    }
    if (target) target.classList.add("is-target");
    return target;
  };

  const byName = (root) =>
    new Map([...root.querySelectorAll("[data-region]")].map((one) => [one.dataset.region, one]));

  // Adds the regions that are new, such as the first events of a run, and removes those that are gone.
  const matchRegions = (shownRegions, freshRegions) => {
    for (const [name, region] of shownRegions) {
      if (!freshRegions.has(name)) region.remove();
    }
    let before = null;
    for (const [name, region] of freshRegions) {
      const existing = shownRegions.get(name);
      if (!existing) {
        if (before) before.after(region);
        else document.querySelector("main").append(region);
      }
      before = existing || region;
    }
  };

  const update = (fresh) => {
    const shownRegions = byName(document);
    const freshRegions = byName(fresh);
    document.title = fresh.title;
    if (![...shownRegions.keys()].some((name) => freshRegions.has(name))) {
      replace(document.querySelector("main"), fresh.querySelector("main"));
      return true;
    }
    let isComplete = true;
    for (const [name, region] of shownRegions) {
      const other = freshRegions.get(name);
      if (!other || other.innerHTML === region.innerHTML) continue;
      if (hasSelection(region)) isComplete = false;
      else replace(region, other);
    }
    matchRegions(shownRegions, freshRegions);
    markTarget();
    return isComplete;
  };

  const load = async () => {
    if (isLoading || wanted === shown || document.hidden) return;
    isLoading = true;
    const version = wanted;
    try {
      const response = await fetch(location.href, { headers: { "x-live": "1" }, redirect: "error" });
      if (response.ok) {
        const text = await response.text();
        if (update(new DOMParser().parseFromString(text, "text/html"))) shown = version;
        say("live", "on");
      } else if (response.status === 404) {
        say("deleted", "off");
        source.close();
      } else {
        say("store unavailable", "off");
      }
    } catch {
      say("reconnecting", "off");
    } finally {
      isLoading = false;
    }
    if (wanted !== version) load();
  };

  const source = new EventSource(address + location.search);
  source.onmessage = (event) => {
    // The first version is that of a page which has just been loaded; it may have changed since.
    wanted = event.data;
    say("live", "on");
    load();
  };
  source.onerror = () => say("reconnecting", "off");
  document.addEventListener("visibilitychange", load);
  window.addEventListener("pagehide", () => source.close());

  // A link to a step opens it.
  const openTarget = () => {
    const target = markTarget();
    if (target) target.open = true;
  };
  window.addEventListener("hashchange", openTarget);
  openTarget();
})();
