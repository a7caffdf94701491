// Runs once for each pane; `element` is the pane, `trigger` sends an event to the server, `watch` follows updates.
const opened = new Set();
let formulas = null;

function copyText(text, button) {
  const done = () => {
    const title = button.title;
    button.title = button.closest("[data-copied]").dataset.copied;
    button.classList.add("done");
    setTimeout(() => { button.title = title; button.classList.remove("done"); }, 1500);
  };
  if (navigator.clipboard) {
    navigator.clipboard.writeText(text).then(done, () => copyBySelection(text, done));
  } else {
    copyBySelection(text, done);
  }
}

// Without https the browser gives no clipboard to a page.
function copyBySelection(text, done) {
  const area = document.createElement("textarea");
  area.value = text;
  area.style.position = "fixed";
  area.style.opacity = "0";
  document.body.append(area);
  area.select();
  if (document.execCommand("copy")) done();
  area.remove();
}

function editQuestion(message, button) {
  const body = message.querySelector(".body");
  const area = document.createElement("textarea");
  area.value = message.dataset.text;
  area.className = "editor";
  area.rows = Math.min(8, area.value.split("\n").length + 1);
  const buttons = document.createElement("div");
  buttons.className = "editor-buttons";
  const leave = () => { area.remove(); buttons.remove(); message.classList.remove("edited"); };
  const send = () => {
    trigger("edit", { index: Number(message.dataset.turn), value: area.value });
    leave();
  };
  for (const [label, action] of [[button.dataset.send, send], [button.dataset.cancel, leave]]) {
    const each = document.createElement("button");
    each.type = "button";
    each.textContent = label;
    each.addEventListener("click", action);
    buttons.append(each);
  }
  area.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); send(); }
    if (event.key === "Escape") leave();
  });
  message.classList.add("edited");
  body.after(area, buttons);
  area.focus();
}

function addCopyButtons() {
  for (const code of element.querySelectorAll("[data-text] .code:not(:has(> button))")) {
    const button = document.createElement("button");
    const copy = element.querySelector("[data-action=copy]");
    button.type = "button";
    button.dataset.action = "copy-code";
    button.title = code.closest("[data-copy-code]").dataset.copyCode;
    button.setAttribute("aria-label", button.title);
    if (copy) button.innerHTML = copy.innerHTML;
    code.append(button);
  }
}

async function drawFormulas() {
  if (!props.katex_script || !element.querySelector(".formula")) return;
  if (!formulas) {
    const style = document.createElement("link");
    style.rel = "stylesheet";
    style.href = new URL(props.katex_style, document.baseURI).href;
    document.head.append(style);
    formulas = import(new URL(props.katex_script, document.baseURI).href);
  }
  const { default: render } = await formulas;
  const delimiters = [
    { left: "$$", right: "$$", display: true },
    { left: "\\[", right: "\\]", display: true },
    { left: "\\(", right: "\\)", display: false },
  ];
  for (const formula of element.querySelectorAll(".formula:not(:has(.katex))")) {
    render(formula, { delimiters, throwOnError: false });
  }
}

// An update takes from a message what it doesn't hold itself: open folds, drawn formulas, buttons of code.
function restore() {
  element.querySelectorAll("details").forEach((details) => {
    details.open = opened.has(foldName(details));
  });
  addCopyButtons();
  drawFormulas();
}

function foldName(details) {
  const message = details.closest("[data-turn]");
  return message.dataset.turn + " " + [...message.querySelectorAll("details")].indexOf(details);
}

element.addEventListener("click", (event) => {
  const summary = event.target.closest("summary");
  if (summary) {
    const name = foldName(summary.parentElement);
    summary.parentElement.open ? opened.delete(name) : opened.add(name);
    return;
  }
  const button = event.target.closest("[data-action]");
  if (!button) return;
  const message = button.closest("[data-turn]");
  const action = button.dataset.action;
  if (action === "copy") copyText(message.dataset.text, button);
  else if (action === "copy-code") copyText(button.parentElement.querySelector("code").textContent, button);
  else if (action === "edit") editQuestion(message, button);
  else if (action === "retry") trigger("retry");
  else if (action === "undo") trigger("undo");
  else if (action === "example") trigger("example_select", { index: Number(button.dataset.index) });
  else if (action === "like" || action === "dislike") {
    trigger("like", { index: Number(message.dataset.turn), liked: action === "like" });
    button.classList.add("done");
  }
});

watch("value", restore);
restore();
