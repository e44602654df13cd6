"use strict";
// What HTML and htmx leave open: copying, dropping a file, and what was open staying open while the answer follows the edits.

function offerCopies(root) {
  for (const copy of root.querySelectorAll("details.copy:not([data-ready])")) {
    copy.dataset.ready = "true";
    const button = document.createElement("button");
    button.type = "button";
    button.className = "second";
    button.textContent = "Copy";
    button.addEventListener("click", async () => {
      await navigator.clipboard.writeText(copy.querySelector("pre").textContent);
      button.textContent = "Copied";
    });
    copy.append(button);
  }
}

function opened() {
  return [...document.querySelectorAll("#answer details[open] > summary")].map((summary) => summary.textContent.split(":")[0].trim());
}

document.addEventListener("DOMContentLoaded", () => {
  offerCopies(document);
  // The token has no name in the form, so that no submission carries it: it goes along as a header, and only while this page is open.
  const token = document.getElementById("f-token");
  if (token) document.getElementById("token-field").hidden = false;
  document.body.addEventListener("htmx:configRequest", (event) => {
    if (token && token.value.trim()) event.detail.headers["X-HF-Token"] = token.value.trim();
  });
  let open = [];
  document.body.addEventListener("htmx:beforeSwap", (event) => {
    if (event.detail.target.id === "answer") open = opened();
    const kind = event.detail.xhr.getResponseHeader("content-type") || "";
    if (!kind.startsWith("text/html")) {
      // A problem document of the service: too many requests, or a fault.
      event.detail.shouldSwap = false;
      document.getElementById("spoken").textContent = "The service did not answer; try again in a moment.";
      document.getElementById("spoken").classList.remove("hidden");
    } else {
      document.getElementById("spoken").classList.add("hidden");
    }
  });
  document.body.addEventListener("htmx:afterSwap", (event) => {
    offerCopies(document);
    if (event.detail.target.id !== "answer") return;
    for (const summary of document.querySelectorAll("#answer details > summary")) {
      if (open.includes(summary.textContent.split(":")[0].trim())) summary.parentElement.open = true;
    }
  });

  const paste = document.querySelector("form.paste");
  if (!paste) return;
  paste.addEventListener("dragover", (event) => { event.preventDefault(); paste.classList.add("over"); });
  paste.addEventListener("dragleave", () => paste.classList.remove("over"));
  paste.addEventListener("drop", async (event) => {
    event.preventDefault();
    paste.classList.remove("over");
    const file = event.dataTransfer.files[0];
    if (!file || file.size > 1048576) return;
    paste.querySelector("details").open = true;
    paste.querySelector("textarea").value = await file.text();
  });
});
