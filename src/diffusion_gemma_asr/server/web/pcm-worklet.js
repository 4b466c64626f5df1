// Sound of the microphone as 16-bit samples at the rate that the server is told, a tenth of a second at a time.

class Pcm extends AudioWorkletProcessor {
  constructor({ processorOptions: { rate } }) {
    super();
    this.ratio = sampleRate / rate; // 1 where the browser resamples
    this.block = new Int16Array(Math.round(rate / 10));
    this.filled = this.sum = this.weight = this.peak = 0;
  }

  process([[channel]]) {
    for (const value of channel ?? []) {
      let left = 1; // of this sample: each one that goes out is the mean over the time it stands for
      while (left > 1e-9) {
        const taken = Math.min(left, this.ratio - this.weight);
        this.sum += taken * value;
        this.weight += taken;
        left -= taken;
        if (this.weight > this.ratio - 1e-9) this.push(this.sum / this.ratio);
      }
    }
    return true;
  }

  push(value) {
    this.sum = this.weight = 0;
    this.peak = Math.max(this.peak, Math.abs(value));
    this.block[this.filled++] = 32767 * Math.max(-1, Math.min(1, value));
    if (this.filled < this.block.length) return;
    this.port.postMessage({ samples: this.block.slice(), peak: this.peak });
    this.filled = this.peak = 0;
  }
}

registerProcessor("pcm", Pcm);
