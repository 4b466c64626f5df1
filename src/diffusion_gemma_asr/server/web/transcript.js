// Segments with times that play the sound, and files made of them.

const LINE = 42; // characters of a subtitle's line
const CUE_S = 6;

const clock = (seconds, mark = ".", hours = false) => {
  const ms = Math.max(0, Math.round(1000 * seconds));
  const pad = (value, places = 2) => String(value).padStart(places, "0");
  const [h, m, s] = [Math.floor(ms / 3600000), Math.floor(ms / 60000) % 60, Math.floor(ms / 1000) % 60];
  if (hours) return `${pad(h)}:${pad(m)}:${pad(s)}${mark}${pad(ms % 1000, 3)}`;
  return `${h ? `${h}:${pad(m)}` : m}:${pad(s)}`;
};

/** Words with times, and with the space before them; where there are none they share out their segment by their lengths. */
function words({ start, end, text, words: timed }) {
  let from = 0;
  if (timed?.length) {
    return timed.map(({ word, start, end }) => {
      const to = Math.max(from, text.indexOf(word.trim(), from)) + word.trim().length;
      const piece = text.slice(from, to);
      from = to;
      return { text: piece, start, end };
    });
  }
  const parts = text.match(/\s*[^\s\p{sc=Han}]+|\s*\p{sc=Han}[^\s\p{L}]*/gu) ?? [text];
  const rate = (end - start) / Math.max(1, text.length);
  let at = start;
  return parts.map((part) => ({ text: part, start: at, end: (at += rate * part.length) }));
}

/** Subtitles of two lines and six seconds at most. */
function cues(segments) {
  const made = [];
  for (const segment of segments) {
    let cue = null;
    for (const word of words(segment)) {
      if (!cue || cue.text.length + word.text.length > 2 * LINE || word.end - cue.start > CUE_S) {
        made.push((cue = { start: word.start, end: word.end, text: word.text.trimStart() }));
      } else {
        cue.text += word.text;
        cue.end = word.end;
      }
    }
  }
  return made.map((cue) => ({ ...cue, text: broken(cue.text) }));
}

/** Text of one line, or of two at the space nearest to its middle. */
function broken(text) {
  if (text.length <= LINE) return text;
  const spaces = [...text.matchAll(/\s+/g)].map((match) => match.index);
  if (!spaces.length) return `${text.slice(0, text.length / 2)}\n${text.slice(text.length / 2)}`;
  const near = (place) => Math.abs(place - text.length / 2);
  const at = spaces.reduce((best, place) => (near(place) < near(best) ? place : best));
  return `${text.slice(0, at)}\n${text.slice(at).trimStart()}`;
}

const writers = {
  txt: (segments) => segments.map(({ text }) => `${text}\n`).join(""),
  json: (segments) => JSON.stringify({ text: segments.map(({ text }) => text).join(" "), segments }, null, 2),
  srt: (segments) =>
    cues(segments)
      .map(({ start, end, text }, i) => `${i + 1}\n${clock(start, ",", true)} --> ${clock(end, ",", true)}\n${text}\n`)
      .join("\n"),
  vtt: (segments) =>
    "WEBVTT\n\n" +
    cues(segments)
      .map(({ start, end, text }) => `${clock(start, ".", true)} --> ${clock(end, ".", true)}\n${text.replace(/&/g, "&amp;").replace(/</g, "&lt;")}\n`)
      .join("\n"),
};

export class Transcript {
  /** @param {{section: Element, list: Element, audio: HTMLAudioElement}} parts */
  constructor({ section, list, audio }) {
    Object.assign(this, { section, list, audio, segments: [], name: "transcript", ends: Infinity });
    audio.addEventListener("timeupdate", () => this.mark());
    audio.addEventListener("error", () => (audio.hidden = true)); // not every browser plays every format
  }

  /** A new transcript; `sound` is a Blob that the browser may be able to play. */
  reset(name, sound = null) {
    this.segments = [];
    this.name = name.replace(/\.[^.]*$/, "") || "transcript";
    this.list.replaceChildren();
    this.section.hidden = true;
    this.sound(sound);
  }

  sound(blob) {
    if (this.audio.src) URL.revokeObjectURL(this.audio.src);
    if (blob) this.audio.src = URL.createObjectURL(blob);
    else this.audio.removeAttribute("src");
    this.audio.hidden = !blob;
  }

  /** A row for a segment, which may still grow. */
  add(segment) {
    const row = this.list.appendChild(document.createElement("li"));
    const time = row.appendChild(document.createElement("button"));
    time.type = "button";
    time.className = "time quiet";
    const line = row.appendChild(document.createElement("p"));
    line.dir = "auto";
    const text = line.appendChild(document.createElement("span"));
    const partial = line.appendChild(document.createElement("span"));
    partial.className = "partial";
    partial.setAttribute("aria-hidden", "true"); // what may still change is not read aloud
    const entry = { ...segment, row: { row, time, text, partial } };
    time.addEventListener("click", () => this.play(entry));
    this.segments.push(entry);
    this.update(entry, {});
    this.section.hidden = false;
    return entry;
  }

  /** Changes fields of a segment; `text` only ever grows. */
  update(entry, fields) {
    Object.assign(entry, fields);
    const { time, text, partial } = entry.row;
    time.textContent = clock(entry.start);
    time.setAttribute("aria-label", `play from ${clock(entry.start)}`);
    if (entry.language) text.parentElement.lang = entry.language;
    const more = entry.text.slice(text.textContent.length);
    if (more) text.append(more);
    partial.textContent = entry.partial ?? "";
  }

  remove(entry) {
    entry.row.row.remove();
    this.segments = this.segments.filter((other) => other !== entry);
  }

  play(entry) {
    if (!this.audio.src || this.audio.hidden) return;
    this.audio.currentTime = entry.start;
    this.audio.play().catch(() => {});
  }

  mark() {
    const now = this.audio.currentTime;
    for (const { row, start, end } of this.segments) {
      row.row.classList.toggle("now", !this.audio.paused && start <= now && now < end);
    }
  }

  /** Saves a file; `kind` is txt, srt, vtt or json. */
  download(kind) {
    const plain = this.segments.map(({ row, partial, ...segment }) => segment);
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([writers[kind](plain)], { type: "text/plain;charset=utf-8" }));
    link.download = `${this.name}.${kind}`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  }
}
