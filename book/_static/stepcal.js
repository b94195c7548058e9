// Small help for readers: regions that scroll take the focus, marks of a figure name themselves, print links.
(function () {
  "use strict";

  function scrollable() {
    document.querySelectorAll(".table-scroll, .bd-article table.docutils, .bd-article table.table, pre, mjx-container[display='true'], .fig-scroll").forEach(function (region) {
      if (region.scrollWidth > region.clientWidth + 1) {
        region.setAttribute("tabindex", "0");
        region.classList.add("scrolls");
      } else {
        region.removeAttribute("tabindex");
        region.classList.remove("scrolls");
      }
    });
  }

  function tips() {
    var tip = document.createElement("div");
    tip.className = "fig-tip";
    tip.setAttribute("aria-hidden", "true");
    document.body.appendChild(tip);
    function show(event) {
      var mark = event.target.closest && event.target.closest(".tip");
      if (!mark) { return; }
      var box = mark.getBoundingClientRect();
      tip.textContent = mark.getAttribute("aria-label");
      tip.classList.add("shown");
      var left = Math.min(Math.max(8, box.left + box.width / 2 - tip.offsetWidth / 2), window.innerWidth - tip.offsetWidth - 8);
      var above = box.top - tip.offsetHeight - 8;
      tip.style.left = left + "px";
      tip.style.top = (above > 4 ? above : box.bottom + 8) + "px";
    }
    function hide() { tip.classList.remove("shown"); }
    document.querySelectorAll(".stepcal-figure").forEach(function (figure) {
      ["mouseover", "focusin"].forEach(function (name) { figure.addEventListener(name, show); });
      ["mouseout", "focusout"].forEach(function (name) { figure.addEventListener(name, hide); });
    });
    window.addEventListener("scroll", hide, { passive: true });
    document.addEventListener("keydown", function (event) { if (event.key === "Escape") { hide(); } });
  }

  window.addEventListener("load", function () {
    scrollable();
    if (document.querySelector(".tip")) { tips(); }
    document.querySelectorAll("details").forEach(function (d) { d.addEventListener("toggle", scrollable); });
    if (window.MathJax && window.MathJax.startup && window.MathJax.startup.promise) {
      window.MathJax.startup.promise.then(scrollable);
    }
  });
  window.addEventListener("resize", scrollable);
})();
