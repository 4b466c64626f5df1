// The canvas: one cell a token, coloured by how sure the model is; a slider replays the steps.

const FRAME_MS = 420;
const still = matchMedia("(prefers-reduced-motion: reduce)");

/** Fills an element with cells, and marks those whose token is another one than before. */
function draw(element, { tokens, judged }) {
  const before = element.children.length > 0 && !element.classList.contains("unjudged");
  element.classList.toggle("unjudged", !judged);
  tokens.forEach(({ text, confidence }, place) => {
    const word = text.trim();
    let cell = element.children[place];
    const changed = !cell || cell.textContent !== word;
    if (!cell) cell = element.appendChild(document.createElement("span"));
    cell.classList.toggle("inside", !/^\s/.test(text) && place > 0);
    cell.style.setProperty("--sure", confidence.toFixed(3));
    cell.title = judged ? `${Math.round(100 * confidence)} %` : "";
    cell.classList.remove("fresh", "changed");
    if (!changed) return;
    cell.textContent = word;
    void cell.offsetWidth; // the animation begins anew
    cell.classList.add("fresh");
    cell.classList.toggle("changed", before);
  });
  while (element.children.length > tokens.length) element.lastChild.remove();
}

export class CanvasView {
  /** @param root the section with the elements that carry data attributes */
  constructor(root) {
    this.root = root;
    this.part = (name) => root.querySelector(`[data-${name}]`);
    this.slider = this.part("slider");
    this.slider.addEventListener("input", () => {
      const frame = Number(this.slider.value);
      this.pause();
      this.show(this.chunk, frame);
    });
    this.part("play").addEventListener("click", () => (this.playing ? this.pause() : this.play()));
    this.part("previous").addEventListener("click", () => this.go(this.chunk - 1));
    this.part("next").addEventListener("click", () => this.go(this.chunk + 1));
    this.reset();
  }

  /** Forgets all; `language` is that of the text. */
  reset(language = "") {
    clearTimeout(this.timer);
    Object.assign(this, { chunks: [], chunk: 0, frame: -1, playing: !still.matches, follow: true, timer: 0 });
    this.root.hidden = true;
    for (const name of ["cells", "draft-cells"]) {
      this.part(name).replaceChildren();
      this.part(name).lang = language;
    }
  }

  /** A step of the canvas of a chunk, as the server tells it; a draft comes as step -1. */
  add({ chunk, step, tokens }) {
    const known = (this.chunks[chunk] ??= { frames: [], draft: null });
    const frame = { tokens, judged: tokens.some((token) => token.confidence > 0) };
    if (step < 0) known.draft = frame;
    else known.frames.push(frame);
    this.root.hidden = false;
    if (chunk !== this.chunk) this.bar();
    else if (this.frame < 0 && known.frames.length) this.show(chunk, 0);
    else if (still.matches && this.follow) this.show(chunk, known.frames.length - 1);
    else this.bar();
    if (this.playing && !this.timer) this.wait();
  }

  show(chunk, frame) {
    const { frames, draft } = this.chunks[chunk] ?? {};
    if (!frames?.[frame]) return;
    if (chunk !== this.chunk) this.part("cells").replaceChildren();
    this.chunk = chunk;
    this.frame = frame;
    draw(this.part("cells"), frames[frame]);
    this.part("draft").hidden = !draft || frames.length < 2;
    if (draft) draw(this.part("draft-cells"), draft);
    this.bar();
  }

  /** The controls say where we are. */
  bar() {
    const { frames } = this.chunks[this.chunk] ?? { frames: [] };
    const last = Math.max(0, frames.length - 1);
    this.slider.max = last;
    this.slider.value = this.frame;
    this.slider.setAttribute("aria-valuetext", `step ${this.frame} of ${last}`);
    this.part("replay").hidden = last === 0;
    this.part("step").textContent = `step ${Math.max(0, this.frame)} of ${last}`;
    this.part("note").hidden = last > 0;
    this.part("note").textContent =
      "This model takes its draft for the transcript. Start from noise to watch a canvas being denoised.";
    this.part("chunks").hidden = this.chunks.length < 2;
    this.part("chunk").textContent = `${this.chunk + 1} of ${this.chunks.length}`;
    this.part("previous").disabled = this.chunk === 0;
    this.part("next").disabled = this.chunk >= this.chunks.length - 1;
    const play = this.part("play");
    play.classList.toggle("pause", this.playing);
    play.setAttribute("aria-label", this.playing ? "pause" : "play");
  }

  go(chunk) {
    this.show(chunk, 0);
    if (!still.matches) this.play();
  }

  play() {
    this.playing = true;
    if (this.frame >= (this.chunks[this.chunk]?.frames.length ?? 0) - 1) this.show(this.chunk, 0);
    this.bar();
    this.wait();
  }

  pause() {
    this.playing = this.follow = false;
    clearTimeout(this.timer);
    this.timer = 0;
    this.bar();
  }

  wait() {
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.tick(), FRAME_MS);
  }

  /** The next step; behind the last one the next chunk, if there is one and nobody has taken over. */
  tick() {
    this.timer = 0;
    const { frames } = this.chunks[this.chunk] ?? { frames: [] };
    if (this.frame < frames.length - 1) this.show(this.chunk, this.frame + 1);
    else if (this.follow && this.chunks[this.chunk + 1]?.frames.length) this.show(this.chunk + 1, 0);
    else if (this.running) return this.wait(); // more may come
    else {
      this.playing = false;
      return this.bar();
    }
    this.wait();
  }

  /** Whether the server is still at work. */
  set busy(value) {
    this.running = value;
  }
}
