// The page: a recording or the microphone goes to the server, its text and its canvases come back.

import { CanvasView } from "./canvas.js";
import { Live } from "./microphone.js";
import { Transcript } from "./transcript.js";

const $ = (id) => document.getElementById(id);
const LANGUAGES = { en: "English", de: "Deutsch", fr: "Français", es: "Español", hi: "हिन्दी", zh: "中文" };

const canvas = new CanvasView($("canvas"));
const transcript = new Transcript({ section: $("transcript"), list: $("segments"), audio: $("audio") });
const options = $("options").elements;
const key = {
  get value() {
    return sessionStorage.getItem("key") ?? "";
  },
  set value(value) {
    sessionStorage.setItem("key", value);
  },
};
let work = null; // what can be stopped: {stop()}
let recording = null;

// -- the server --------------------------------------------------------------------------------------------------------

async function ask(path, request = {}) {
  const headers = key.value ? { Authorization: `Bearer ${key.value}` } : {};
  const response = await fetch(path, { ...request, headers });
  if (response.ok) return response;
  const body = await response.json().catch(() => ({}));
  const error = new Error(body.error?.message ?? `the server answers ${response.status}`);
  throw Object.assign(error, { status: response.status });
}

/** The events of a stream, as objects. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (let part = await reader.read(); !part.done; part = await reader.read()) {
    const blocks = (rest + part.value).split(/\r?\n\r?\n/);
    rest = blocks.pop();
    for (const block of blocks) {
      const lines = block.split(/\r?\n/).filter((line) => line.startsWith("data:"));
      const data = lines.map((line) => line.slice(5).trimStart()).join("\n");
      if (data && data !== "[DONE]") yield JSON.parse(data);
    }
  }
}

async function models() {
  let listed;
  try {
    listed = await (await ask("v1/models")).json();
  } catch (error) {
    if (error.status !== 401) return failed(error);
    await new Promise((done) => {
      $("key").addEventListener("close", done, { once: true });
      $("key").showModal();
    });
    key.value = $("key").querySelector("input").value;
    return models();
  }
  options.model.replaceChildren(...listed.data.map((model) => Object.assign(new Option(model.id), { model })));
  languages();
}

/** The languages of the chosen model, where the server tells them. */
function languages() {
  const known = options.model.selectedOptions[0]?.model.languages ?? Object.keys(LANGUAGES);
  const before = options.language.value;
  const auto = known.length > 1 ? [new Option("find out", "auto")] : [];
  options.language.replaceChildren(...auto, ...known.map((code) => new Option(LANGUAGES[code] ?? code, code)));
  if ([...options.language.options].some(({ value }) => value === before)) options.language.value = before;
}

// -- what is going on --------------------------------------------------------------------------------------------------

function busy(text, task = work) {
  work = task;
  $("status").hidden = !task;
  $("state").textContent = text;
  $("stop").hidden = !task || task === recording;
  $("progress").hidden = task === recording;
  canvas.busy = Boolean(task);
}

function failed(error) {
  if (error.name === "AbortError") return;
  $("error").textContent = error.message;
  $("error").hidden = false;
}

function begin(name, sound) {
  if (recording) quiet().close(); // its last words are not waited for
  work?.stop();
  work = null;
  $("error").hidden = true;
  $("downloads").hidden = $("again").hidden = true;
  $("progress").removeAttribute("value");
  canvas.reset(language());
  transcript.reset(name, sound);
}

const language = () => (options.language.value === "auto" ? "" : options.language.value);

// -- recordings --------------------------------------------------------------------------------------------------------

async function transcribe(file) {
  begin(file.name, file);
  const form = new FormData();
  const fields = {
    model: options.model.value,
    language: options.language.value,
    steps: options.steps.value,
    start: options.start.value,
    stream: "true",
    response_format: "verbose_json",
    "timestamp_granularities[]": "word",
    "include[]": "canvas",
    file,
  };
  for (const [name, value] of Object.entries(fields)) if (value) form.append(name, value);
  const abort = new AbortController();
  const task = { stop: () => abort.abort() };
  busy("sending …", task);
  try {
    const response = await ask("v1/audio/transcriptions", { method: "POST", body: form, signal: abort.signal });
    if (work === task) busy("transcribing …");
    for await (const event of events(response)) {
      if (work !== task) return;
      take(event);
    }
  } catch (error) {
    if (work === task) failed(error);
  } finally {
    if (work === task) finish();
  }
}

function take(event) {
  if (event.type === "canvas.step") canvas.add(event);
  else if (event.type === "transcript.text.segment") segment(event);
  else if (event.error) throw new Error(event.error.message);
  else if (event.type === "transcript.text.done" && !transcript.segments.length && event.text) {
    segment({ start: 0, end: $("audio").duration || 0, text: event.text });
  }
}

function segment({ start, end, text, words, language: spoken }) {
  transcript.add({ start, end, text: text.trim(), words, language: spoken ?? language() });
  const { duration } = $("audio");
  if (duration > 0 && Number.isFinite(duration)) $("progress").value = Math.min(1, end / duration);
}

function finish() {
  busy("", null);
  $("downloads").hidden = !transcript.segments.length;
  if (!transcript.segments.length && $("error").hidden) failed(new Error("no speech was found in it"));
}

// -- the microphone ----------------------------------------------------------------------------------------------------

async function speak() {
  if (recording) return recording.stop();
  begin("recording");
  const items = new Map();
  const at = (id, start) => {
    if (!items.has(id)) items.set(id, transcript.add({ start, end: start, text: "", language: language() }));
    return items.get(id);
  };
  let heard = 0;
  const on = {
    level: (peak) => $("speak").style.setProperty("--level", Math.min(1, 2 * peak).toFixed(2)),
    end: (error) => stopped(live, error),
    event(event) {
      if (recording !== live) return;
      const kind = event.type.replace("conversation.item.input_audio_transcription.", "");
      if (kind === "input_audio_buffer.speech_started") at(event.item_id, event.audio_start_ms / 1000);
      else if (kind === "transcript.lag") {
        heard = event.heard_s;
        $("state").textContent = `${(event.lag_s + live.behind).toFixed(1)} s behind`;
      } else if (kind === "transcript.partial") transcript.update(at(event.item_id, heard), { partial: event.text });
      else if (kind === "input_audio_buffer.speech_stopped") at(event.item_id, heard).end = event.audio_end_ms / 1000;
      else if (kind === "delta") {
        const entry = at(event.item_id, heard);
        transcript.update(entry, { text: entry.text + event.delta, partial: "" });
      } else if (kind === "completed" && items.has(event.item_id)) {
        const entry = items.get(event.item_id);
        transcript.update(entry, { partial: "", language: event.languages?.[0]?.code ?? entry.language });
        if (!event.transcript) transcript.remove(entry);
      } else if (kind === "failed" || kind === "error") failed(new Error(event.error.message));
    },
  };
  const transcription = { model: options.model.value, language: options.language.value, steps: Number(options.steps.value) };
  const url = new URL(`v1/realtime?model=${encodeURIComponent(options.model.value)}`, document.baseURI);
  url.protocol = url.protocol.replace("http", "ws");
  const live = new Live({ url, key: key.value, input: { transcription }, on });
  recording = live;
  $("speak").setAttribute("aria-pressed", "true");
  $("speak-label").textContent = "Stop";
  $("speak-hint").textContent = "listening";
  busy("connecting …", live);
  try {
    await live.start();
  } catch (error) {
    stopped(live, error);
  }
}

/** The microphone is not in use any more; gives what recorded. */
function quiet() {
  const live = recording;
  recording = null;
  $("speak").setAttribute("aria-pressed", "false");
  $("speak").style.setProperty("--level", 0);
  $("speak-label").textContent = "Speak";
  $("speak-hint").textContent = "live, as you talk";
  return live;
}

function stopped(live, error) {
  if (recording !== live) return;
  quiet();
  busy("", null);
  if (error) failed(error);
  $("downloads").hidden = !transcript.segments.length;
  if (!live.kept.length) return;
  const file = live.wav();
  transcript.sound(file);
  $("again").hidden = false;
  $("again").onclick = () => transcribe(file);
}

// -- controls ----------------------------------------------------------------------------------------------------------

const drop = $("drop");
for (const kind of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    drop.classList.toggle("over", kind === "dragover");
    const [file] = kind === "drop" ? event.dataTransfer.files : [];
    if (file) transcribe(file);
  });
}
$("file").addEventListener("change", () => {
  const [file] = $("file").files;
  $("file").value = ""; // the same file may be chosen again
  if (file) transcribe(file);
});
$("speak").addEventListener("click", speak);
$("stop").addEventListener("click", () => {
  work?.stop();
  finish();
});
$("options").addEventListener("submit", (event) => event.preventDefault());
options.model.addEventListener("change", languages);
$("downloads").addEventListener("click", ({ target }) => {
  if (target.dataset.download) transcript.download(target.dataset.download);
});
models();
