// A link to a layer opens it.
"use strict";
function open() {
  const layer = document.getElementById(location.hash.slice(1));
  if (layer instanceof HTMLDetailsElement) { layer.open = true; layer.scrollIntoView(); }
}
addEventListener("hashchange", open);
open();
