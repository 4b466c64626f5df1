// The microphone through the realtime socket: words that stay, and text behind them that may still change.

const RATE = 24000;
const BYTES_PER_S = (RATE * 2 * 4) / 3; // as base64
const KEPT_S = 1200; // of sound that can be played again
const BEHIND_S = 30; // of sound that waits in the browser; then it is given up
const LAST_MS = 15000; // for the last words

export class Live {
  /**
   * @param url of the socket
   * @param key of the server, or ""
   * @param input `audio.input` of the session, but for the format
   * @param on functions: event(event), level(0..1), end(error or null)
   */
  constructor({ url, key, input, on }) {
    Object.assign(this, { url, key, input, on, kept: [], waiting: 0, cleared: null });
  }

  async start() {
    if (!navigator.mediaDevices) throw new Error("the microphone needs https, or this page from localhost");
    const audio = { channelCount: 1, echoCancellation: false, noiseSuppression: false };
    this.stream = await navigator.mediaDevices.getUserMedia({ audio });
    try {
      await Promise.all([this.connect(), this.listen()]);
    } catch (error) {
      this.close();
      throw error;
    }
  }

  connect() {
    const url = new URL(this.url);
    const protocols = ["realtime"];
    if (/^[\w.~+-]+$/.test(this.key)) protocols.push(`openai-insecure-api-key.${this.key}`);
    else if (this.key) url.searchParams.set("api_key", this.key);
    this.socket = new WebSocket(url, protocols);
    return new Promise((done, failed) => {
      this.socket.onmessage = ({ data }) => {
        const event = JSON.parse(data);
        if (event.type === "session.created") this.begin();
        if (event.type === "session.updated") done();
        if (event.type === "error") failed(new Error(event.error.message));
        if (event.type === "input_audio_buffer.cleared") this.cleared?.();
        this.on.event(event);
      };
      this.socket.onclose = ({ reason }) => {
        const error = new Error(reason || "the server closed the connection");
        failed(error);
        if (!this.closed) this.end(error);
      };
    });
  }

  begin() {
    const input = { ...this.input, format: { type: "audio/pcm", rate: RATE } };
    this.send({
      type: "session.update",
      session: { type: "transcription", include: ["transcript.partial", "transcript.lag"], audio: { input } },
    });
  }

  async listen() {
    let source;
    try {
      this.context = new AudioContext({ sampleRate: RATE });
      source = this.context.createMediaStreamSource(this.stream);
    } catch {
      this.context = new AudioContext(); // this browser does not resample: the worklet does
      source = this.context.createMediaStreamSource(this.stream);
    }
    await this.context.audioWorklet.addModule(new URL("pcm-worklet.js", import.meta.url));
    const node = new AudioWorkletNode(this.context, "pcm", { numberOfOutputs: 0, processorOptions: { rate: RATE } });
    node.port.onmessage = ({ data }) => this.heard(data);
    source.connect(node);
    this.stream.getAudioTracks()[0].addEventListener("ended", () => this.stop());
  }

  heard({ samples, peak }) {
    if (this.closed || this.cleared || this.socket.readyState !== WebSocket.OPEN) return;
    if (this.behind > BEHIND_S) return this.end(new Error("the server cannot keep up; take a smaller model or fewer steps"));
    if (this.kept.length < KEPT_S * 10) this.kept.push(samples);
    this.send({ type: "input_audio_buffer.append", audio: base64(samples) });
    this.on.level(peak);
  }

  /** Seconds of sound that have not left the browser. */
  get behind() {
    return this.socket.bufferedAmount / BYTES_PER_S;
  }

  send(event) {
    this.socket.send(JSON.stringify(event));
  }

  /** Ends the recording, and waits for its last words. */
  async stop() {
    if (this.closed || this.cleared) return;
    const last = new Promise((done) => (this.cleared = done));
    this.stream.getTracks().forEach((track) => track.stop());
    if (this.kept.length) this.send({ type: "input_audio_buffer.commit" });
    this.send({ type: "input_audio_buffer.clear" }); // answered when all before it is
    await Promise.race([last, new Promise((done) => setTimeout(done, LAST_MS))]);
    this.end(null);
  }

  end(error) {
    if (this.closed) return;
    this.close();
    this.on.end(error);
  }

  close() {
    this.closed = true;
    this.stream.getTracks().forEach((track) => track.stop());
    this.socket?.close();
    this.context?.close();
  }

  /** What was recorded, as a file. */
  wav() {
    const size = this.kept.reduce((sum, block) => sum + block.byteLength, 0);
    const head = new DataView(new ArrayBuffer(44));
    const ascii = (at, text) => [...text].forEach((letter, i) => head.setUint8(at + i, letter.charCodeAt(0)));
    ascii(0, "RIFF");
    head.setUint32(4, 36 + size, true);
    ascii(8, "WAVEfmt ");
    [16, 0x10001, RATE, 2 * RATE, 0x100002].forEach((value, i) => head.setUint32(16 + 4 * i, value, true)); // mono, 16 bits
    ascii(36, "data");
    head.setUint32(40, size, true);
    return new File([head, ...this.kept], "recording.wav", { type: "audio/wav" });
  }
}

function base64(samples) {
  return btoa(String.fromCharCode(...new Uint8Array(samples.buffer, samples.byteOffset, samples.byteLength)));
}
