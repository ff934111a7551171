(function () {
  "use strict";
  const contents = document.querySelector("nav .contents");
  const wide = matchMedia("(min-width: 66rem)");  // as in the style: there the contents stand beside the text
  const fold = () => { if (contents) contents.open = wide.matches; };  // on a phone a list would hide the page
  wide.addEventListener("change", fold);
  addEventListener("beforeprint", () => {
    document.documentElement.dataset.theme = "light";
    for (const details of document.querySelectorAll("details")) details.open = true;
  });
  addEventListener("afterprint", () => { delete document.documentElement.dataset.theme; fold(); });
  fold();
})();
