// Frames of a video with the tokens that the drafter saw, and an answer's words with their marks.
// For the report and for the server's page. The page has the elements with the ids that are named here.
const $ = (id) => document.getElementById(id);
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

export const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));

// Add a word to an answer. Texts are a model's: nodes, never markup. kind: accepted, refused or own.
export function addWord(answer, kind, text, title) {
  if (!text) return;
  const span = document.createElement("span"), start = text.trimStart();
  span.className = kind; span.textContent = start; span.title = title;
  answer.append(text.slice(0, text.length - start.length), span);
}

export class Player {
  // drawn: is called after a frame was drawn, with its image, its first token, and its height and width in tokens.
  constructor(drawn = () => {}) {
    this.video = null; this.kept = null; this.at = 0; this.timer = null; this.images = []; this.drawn = drawn;
    $("play").addEventListener("click", () => this.play(this.timer === null));
    $("frame").addEventListener("input", () => { this.play(false); this.show(Number($("frame").value)); });
    $("whole").addEventListener("change", () => this.draw());
    $("strip").addEventListener("pointerdown", (event) => this.seek(event));
    $("strip").addEventListener("pointermove", (event) => this.seek(event));
    window.addEventListener("resize", () => this.draw());
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
  }

  // Take a video: grid [frames, height, width, newline], the places in it of the frames that are shown, their seconds
  // and their pictures as data URIs. kept: one bit a token, most significant bit first; null if all are kept.
  open(video, kept) {
    this.video = video; this.kept = kept;
    this.images = video.frames.map((uri) => { const image = new Image(); image.src = uri; return image; });
    $("frame").max = Math.max(this.images.length - 1, 0);
    this.at = Math.max(0, Math.min(this.at, this.images.length - 1));
    Promise.all(this.images.map((image) => image.decode())).then(() => { if (this.video === video) this.draw(); });
  }

  keeps(token) { return this.kept === null || Boolean((this.kept[token >> 3] >> (7 - (token & 7))) & 1); }

  // Number of tokens kept of the frame at a place.
  count(place) {
    const [, height, width] = this.video.grid, first = place * height * width;
    let count = 0;
    for (let cell = 0; cell < height * width; cell++) count += this.keeps(first + cell) ? 1 : 0;
    return count;
  }

  show(at) {
    this.at = at;
    $("frame").value = at;
    this.draw();
  }

  play(on) {
    clearInterval(this.timer);
    this.timer = on ? setInterval(() => this.show((this.at + 1) % this.images.length), 450) : null;
    $("play").textContent = on ? "❚❚" : "▶";
    $("play").setAttribute("aria-label", on ? "pause" : "play");
  }

  seek(event) {
    if (!event.buttons || !this.images.length) return;
    const box = $("strip").getBoundingClientRect(), share = (event.clientX - box.left) / box.width;
    this.play(false);
    this.show(Math.max(0, Math.min(this.images.length - 1, Math.floor(share * this.images.length))));
  }

  draw() {
    const image = this.images[this.at];
    if (!image || !image.complete || !image.naturalWidth) return;
    const [frames, height, width, newline] = this.video.grid, place = this.video.shown[this.at], first = place * height * width;
    this.paintKept(image, first, height, width);
    this.drawn(image, first, height, width);
    this.paintStrip();
    $("time").textContent = `frame ${place + 1} of ${frames}, ${this.video.seconds[this.at].toFixed(1)} s`;
    const whole = this.kept === null ? "this drafter chose by no pruner" : `${this.count(place)} of ${height * width} tokens of this frame`;
    const line = newline && this.kept ? `; newline token ${this.keeps(frames * height * width) ? "kept" : "dropped"}` : "";
    $("kept-note").textContent = `kept: ${whole}${line}`;
    document.body.dataset.frame = place;
  }

  // Draw an image on a canvas. Returns its pen, and functions from columns and rows of tokens to pixels.
  canvas(id, image, height, width) {
    const canvas = $(id), w = canvas.width = image.naturalWidth * 2, h = canvas.height = image.naturalHeight * 2;
    const pen = canvas.getContext("2d");
    pen.drawImage(image, 0, 0, w, h);
    return [pen, (column) => Math.round(column * w / width), (row) => Math.round(row * h / height)];
  }

  paintKept(image, first, height, width) {
    const [pen, x, y] = this.canvas("kept", image, height, width);
    if ($("whole").checked || this.kept === null) return;
    const there = (row, column) =>
      row >= 0 && row < height && column >= 0 && column < width && this.keeps(first + row * width + column);
    pen.fillStyle = "rgba(12, 14, 20, .8)";
    for (let row = 0; row < height; row++) for (let column = 0; column < width; column++)
      if (!there(row, column)) pen.fillRect(x(column), y(row), x(column + 1) - x(column), y(row + 1) - y(row));
    // The border of what is kept: a dark scene's bright and dim look alike.
    pen.strokeStyle = "#ffd34d"; pen.lineWidth = 3;
    pen.beginPath();
    for (let row = 0; row <= height; row++) for (let column = 0; column <= width; column++) {
      if (column < width && there(row, column) !== there(row - 1, column)) { pen.moveTo(x(column), y(row)); pen.lineTo(x(column + 1), y(row)); }
      if (row < height && there(row, column) !== there(row, column - 1)) { pen.moveTo(x(column), y(row)); pen.lineTo(x(column), y(row + 1)); }
    }
    pen.stroke();
  }

  // How much of each frame is kept.
  paintStrip() {
    const canvas = $("strip"), w = canvas.width = 2 * (canvas.clientWidth || 300), h = canvas.height = 80;
    const pen = canvas.getContext("2d"), step = w / this.images.length;
    const counts = this.video.shown.map((place) => this.count(place)), top = Math.max(...counts, 1e-6);
    counts.forEach((count, i) => {
      pen.fillStyle = css(i === this.at ? "--accent" : "--line");
      const tall = Math.max(4, count / top * (h - 8));
      pen.fillRect(i * step + 1, h - tall, Math.max(step - 2, 1), tall);
    });
  }
}
