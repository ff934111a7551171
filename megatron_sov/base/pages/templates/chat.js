// Talks to the models of the server that this page comes from. What a model writes is inserted as text, never as HTML.
(function () {
  "use strict";
  const KEY = "megatron-sov-key";
  const TOO_LONG = /context_length|maximum context|max_model_len/;
  const get = (id) => document.getElementById(id);
  const log = get("log"), message = get("message"), note = get("note");
  const state = { models: [], turns: [], writing: null };
  const wide = matchMedia("(min-width: 66rem)");

  function make(tag, className, text) {
    const element = document.createElement(tag);
    if (className) element.className = className;
    if (text !== undefined) element.textContent = text;
    return element;
  }

  function button(text, does) {
    const element = make("button", "", text);
    element.type = "button";
    element.addEventListener("click", does);
    return element;
  }

  // The key: from the address (#token=KEY), from this tab, or asked for.

  function readKey() {
    const given = new URLSearchParams(location.hash.slice(1)).get("token");
    if (given) {
      sessionStorage.setItem(KEY, given);
      history.replaceState(null, "", location.pathname + location.search);
    }
    return sessionStorage.getItem(KEY) || "";
  }

  let key = readKey();

  function askForKey() {
    return new Promise((resolve) => {
      const door = get("door"), form = get("key-form");
      // without the key the page can do nothing, so Esc does not close it
      door.addEventListener("cancel", (event) => event.preventDefault());
      form.addEventListener("submit", (event) => {
        event.preventDefault();
        key = get("key").value;
        get("key").value = "";
        sessionStorage.setItem(KEY, key);
        door.close();
        resolve();
      }, { once: true });
      door.showModal();
    });
  }

  async function ask(path, options) {
    for (;;) {
      const headers = { ...(options.body ? { "Content-Type": "application/json" } : {}), ...(key ? { Authorization: `Bearer ${key}` } : {}) };
      const response = await fetch(path, { ...options, headers });
      if (response.status !== 401) return response;
      await askForKey();
    }
  }

  // Answers: what is shown of one, and how it is written.

  // Code between lines of three backticks is set as code; all else stays as it was written.
  function fill(element, text) {
    const parts = text.split(/^```[^\n`]*(?:\n|$)/m);
    element.replaceChildren(...parts.map((part, i) => {
      if (i % 2) {
        const pre = make("pre");
        pre.tabIndex = 0;
        pre.append(make("code", "", part.replace(/\n$/, "")));
        return pre;
      }
      const said = part.replace(/^\n+|\n+$/g, "");
      return said || (!i && parts.length === 1) ? make("p", "", said) : null;
    }).filter(Boolean));
  }

  function newAnswer(turn, model) {
    const view = {
      root: make("article", "answer"), thoughts: make("details", "thoughts"), summary: make("summary"), thought: make("div"),
      said: make("div", "said"), problem: make("p", "problem"), below: make("div", "below"), figures: make("span"),
    };
    view.root.setAttribute("aria-label", `Answer of ${model.id}`);
    if (state.models.length > 1) view.root.append(make("p", "who", model.id));
    view.thoughts.append(view.summary, view.thought);
    view.thoughts.hidden = view.problem.hidden = true;
    const answer = { model, turn, view, said: "", thoughts: "", isWhole: false, problem: "" };
    const copy = button("Copy", async () => {
      await navigator.clipboard.writeText(answer.said).then(() => { copy.textContent = "Copied"; }, () => { copy.textContent = "Not allowed here"; });
      setTimeout(() => { copy.textContent = "Copy"; }, 1500);
    });
    view.again = button("Regenerate", () => regenerate(answer));
    view.below.append(copy, view.again, view.figures);
    view.root.append(view.thoughts, view.said, view.problem, view.below);
    return answer;
  }

  function show(answer) {
    const isLow = log.scrollHeight - log.scrollTop - log.clientHeight < 80;
    const { view } = answer;
    fill(view.said, answer.said);
    view.thoughts.hidden = !answer.thoughts;
    view.thought.textContent = answer.thoughts;
    view.summary.textContent = answer.said || answer.isWhole || !state.writing
      ? `Thoughts, ${answer.thoughts.length} characters` : `Thinking, ${answer.thoughts.length} characters`;
    view.problem.hidden = !answer.problem;
    view.problem.textContent = answer.problem;
    if (isLow) log.scrollTop = log.scrollHeight;
  }

  // What a model has seen: the system prompt, and each earlier turn that it has answered itself.
  function history_of(answer, first) {
    const found = get("system").value.trim() ? [{ role: "system", content: get("system").value.trim() }] : [];
    for (const turn of state.turns.slice(first, state.turns.indexOf(answer.turn))) {
      const given = turn.answers.find((one) => one.model === answer.model);
      if (given && given.said) found.push({ role: "user", content: turn.user }, { role: "assistant", content: given.said });
    }
    return [...found, { role: "user", content: answer.turn.user }];
  }

  function request(answer, first) {
    const body = { model: answer.model.id, messages: history_of(answer, first), stream: true, stream_options: { include_usage: true } };
    const temperature = get("temperature").valueAsNumber, longest = get("longest").valueAsNumber;
    if (Number.isFinite(temperature)) body.temperature = temperature;
    if (longest > 0) body.max_tokens = longest;
    return JSON.stringify(body);
  }

  async function open(answer, signal) {
    for (let first = answer.model.first; ; first += 1) {
      const response = await ask("/v1/chat/completions", { method: "POST", body: request(answer, first), signal });
      if (response.ok) {
        if (first > answer.model.first) note.textContent = `The conversation is longer than the context of ${answer.model.id}. The oldest turns are left out.`;
        answer.model.first = first;
        return response;
      }
      const error = (await response.json().catch(() => ({}))).error || {};
      const isTooLong = TOO_LONG.test(`${error.code} ${error.message}`);
      if (!isTooLong || first >= state.turns.indexOf(answer.turn)) throw new Error(error.message || `The server answered ${response.status}.`);
    }
  }

  async function* events(response) {
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    for (let rest = ""; ;) {
      const { value, done } = await reader.read();
      if (done) return;
      const parts = (rest + value).split("\n\n");
      rest = parts.pop();
      for (const part of parts) {
        const data = part.replace(/^data: ?/, "");
        if (data === "[DONE]") return;
        yield JSON.parse(data);
      }
    }
  }

  async function write(answer, signal) {
    Object.assign(answer, { said: "", thoughts: "", isWhole: false, problem: "" });
    answer.view.root.classList.add("is-writing");
    answer.view.figures.textContent = "";
    show(answer);
    const beganMs = performance.now();
    let reason = "", tokens = 0;
    try {
      for await (const event of events(await open(answer, signal))) {
        if (event.error) throw new Error(event.error.message);
        if (event.usage) tokens = event.usage.completion_tokens;
        for (const { delta, finish_reason: why } of event.choices || []) {
          answer.said += delta.content || "";
          answer.thoughts += delta.reasoning_content || "";
          reason = why || reason;
        }
        show(answer);
      }
      if (!reason) throw new Error("The server broke off.");
      answer.isWhole = reason === "stop";
    } catch (error) {
      if (signal.aborted) reason = "stopped";
      else answer.problem = error.message;
    }
    answer.view.root.classList.remove("is-writing");
    const seconds = (performance.now() - beganMs) / 1000;
    const why = { length: "cut at the longest answer", stopped: "stopped" }[reason];
    answer.view.figures.textContent = [tokens && `${tokens} tokens, ${(tokens / seconds).toFixed(0)} a second`, why].filter(Boolean).join(", ");
    if (!answer.said && !answer.problem && reason === "stop") answer.problem = "The model has ended its answer without a word.";
    show(answer);
  }

  async function writeAll(answers) {
    state.writing = new AbortController();
    note.textContent = "";
    update();
    await Promise.all(answers.map((answer) => write(answer, state.writing.signal)));
    state.writing = null;
    answers.forEach(show);
    update();
  }

  function regenerate(answer) {
    if (!state.writing) writeAll([answer]);
  }

  // Turns.

  function send() {
    const text = message.value.trim();
    const chosen = state.models.filter((model) => model.isChosen);
    if (!text || state.writing || !chosen.length) return;
    const turn = { user: text, root: make("section", chosen.length > 1 ? "turn several" : "turn"), answers: [] };
    const answers = make("div", "answers");
    turn.answers = chosen.map((model) => newAnswer(turn, model));
    answers.append(...turn.answers.map((answer) => answer.view.root));
    const said = make("p", "user", text);
    said.setAttribute("aria-label", `You: ${text}`);
    turn.root.append(said, answers);
    state.turns.push(turn);
    log.append(turn.root);
    message.value = "";
    grow();
    log.scrollTop = log.scrollHeight;
    writeAll(turn.answers);
  }

  function update() {
    const isWriting = Boolean(state.writing), last = state.turns.at(-1);
    get("empty").hidden = state.turns.length > 0;
    get("send").hidden = isWriting;
    get("stop").hidden = !isWriting;
    get("send").disabled = !message.value.trim() || !state.models.some((model) => model.isChosen);
    get("save").disabled = isWriting || !rows().length;
    get("new").disabled = isWriting || !state.turns.length;
    log.setAttribute("aria-busy", String(isWriting));
    for (const turn of state.turns) for (const answer of turn.answers) answer.view.again.hidden = turn !== last;
  }

  function grow() {
    message.style.height = "auto";
    message.style.height = `${message.scrollHeight}px`;
  }

  // Rows as `sov-data pack --format chat` reads them, one for each model. Answers that have no end are not learned, nor are
  // earlier ones with thoughts, which most templates drop.
  function rows() {
    return state.models.map((model) => {
      const messages = [];
      let numLearned = 0;
      const given = state.turns.map((turn) => [turn, turn.answers.find((one) => one.model === model)]).filter(([, answer]) => answer && answer.said);
      for (const [i, [turn, answer]] of given.entries()) {
        const isLast = i === given.length - 1, isLearned = answer.isWhole && (isLast || !answer.thoughts);
        numLearned += isLearned;
        messages.push({ role: "user", content: turn.user }, {
          role: "assistant", content: answer.said, ...(answer.thoughts && isLast ? { reasoning_content: answer.thoughts } : {}),
          ...(isLearned ? {} : { train: false }),
        });
      }
      const system = get("system").value.trim();
      return numLearned ? { messages: [...(system ? [{ role: "system", content: system }] : []), ...messages], model: model.id } : null;
    }).filter(Boolean);
  }

  function save() {
    const link = make("a");
    link.href = URL.createObjectURL(new Blob(rows().map((row) => `${JSON.stringify(row)}\n`), { type: "application/jsonl" }));
    link.download = "chat.jsonl";
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  }

  function begin() {
    for (const turn of state.turns) turn.root.remove();
    for (const model of state.models) model.first = 0;
    state.turns = [];
    note.textContent = "";
    update();
    message.focus();
  }

  // The models of the server.

  function list() {
    const names = state.models.map((model) => model.id);
    get("title").textContent = names.join(", ");
    document.title = `Chat: ${names.join(", ")}`;
    const able = state.models.filter((model) => model.isAble);
    get("invitation").textContent = able.length ? `Ask ${able.map((model) => model.id).join(" and ")} something.`
      : `${names.join(", ")} has no chat template, so it cannot answer here. Fine-tune it on chats first.`;
    get("longest").value = Math.max(1, Math.floor(Math.min(...state.models.map((model) => model.context)) / 2));
    get("choice").hidden = names.length < 2;
    get("choice").append(...state.models.map((model) => {
      const label = make("label"), box = make("input");
      Object.assign(box, { type: "checkbox", checked: model.isChosen, disabled: !model.isAble });
      box.addEventListener("change", () => { model.isChosen = box.checked; update(); });
      label.append(box, make("span", "", model.isAble ? model.id : `${model.id} (no chat template)`));
      return label;
    }));
  }

  async function load() {
    try {
      const response = await ask("/v1/models", {});
      if (!response.ok) throw new Error(`The server answered ${response.status}.`);
      state.models = (await response.json()).data.map((card) => ({
        id: card.id, context: card.max_model_len, isAble: card.has_chat_template, isChosen: card.has_chat_template, first: 0,
      }));
      list();
    } catch (error) {
      get("title").textContent = "No answer";
      get("invitation").textContent = "The server does not answer. Start it again and reload this page.";
    }
    update();
    if (wide.matches) message.focus();
  }

  get("composer").addEventListener("submit", (event) => { event.preventDefault(); send(); });
  message.addEventListener("input", () => { grow(); update(); });
  message.addEventListener("keydown", (event) => {
    // while a syllable is being composed, Enter ends it and sends nothing
    if (event.key !== "Enter" || event.shiftKey || event.isComposing || event.keyCode === 229) return;
    event.preventDefault();
    send();
  });
  addEventListener("keydown", (event) => { if (event.key === "Escape" && state.writing) state.writing.abort(); });
  get("stop").addEventListener("click", () => state.writing && state.writing.abort());
  get("new").addEventListener("click", begin);
  get("save").addEventListener("click", save);
  const settings = get("settings"), follow = () => { settings.open = wide.matches; };
  wide.addEventListener("change", follow);
  follow();
  load();
})();
