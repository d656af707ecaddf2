"use strict";
{ // the library has names of its own
const $ = (id) => document.getElementById(id);
const json = (id) => JSON.parse($(id).textContent);
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

// ---- figures ----------------------------------------------------------------------------------------------------------
const specs = json("specs");
const drawn = [...document.querySelectorAll(".plot")].map((place) =>
  // ast: expressions are interpreted, so that the page needs no eval.
  vegaEmbed(place, specs[place.dataset.spec], { actions: false, renderer: "svg", ast: true, tooltip: { theme: "custom" } })
    .then((made) => { place.view = made.view; }));
Promise.all(drawn).then(() => { document.body.dataset.drawn = drawn.length; });

// ---- the table, sorted by a click -----------------------------------------------------------------------------------------
for (const table of document.querySelectorAll("table.summary")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.firstElementChild.addEventListener("click", () => {
    const up = head.getAttribute("aria-sort") === "descending" || (column === 0 && head.getAttribute("aria-sort") === "none");
    heads.forEach((other) => other.setAttribute("aria-sort", "none"));
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const value = (row) => row.cells[column].dataset.value === "" ? NaN : Number(row.cells[column].dataset.value);
    const rows = [...table.tBodies[0].rows].sort((a, b) => {
      const [x, y] = [value(a), value(b)];
      if (Number.isNaN(x) || Number.isNaN(y)) return Number.isNaN(x) - Number.isNaN(y);
      return up ? x - y : y - x;
    });
    table.tBodies[0].append(...rows);
  }));
}

// ---- the player -----------------------------------------------------------------------------------------------------------
const data = json("data");
if (data.samples.length) {
  const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const state = { sample: null, view: null, at: 0, timer: null, images: [], kept: null, heat: null };
  // Black, purple, orange, yellow: lightness rises all the way, for eyes that see no hue.
  const heatColour = (v) => {
    const stops = [[10, 7, 40], [110, 25, 110], [230, 90, 40], [250, 240, 120]];
    const t = Math.min(v, 0.9999) * 3, i = Math.floor(t), f = t - i;
    return stops[i].map((c, k) => Math.round(c + (stops[i + 1][k] - c) * f));
  };

  function option(select, value, text) {
    const item = document.createElement("option");
    item.value = value; item.textContent = text;
    select.append(item);
  }

  function chooseSample(number) {
    const sample = state.sample = data.samples[number];
    const before = $("job").value;
    $("job").replaceChildren();
    sample.views.forEach((view) => option($("job"), view.job, data.jobs[view.job]));
    const known = (job) => sample.views.some((view) => String(view.job) === String(job));
    $("job").value = [before, data.first].find(known) ?? sample.views[0].job;
    $("question").textContent = sample.question;
    $("problem").textContent = sample.problem;
    $("problem").hidden = !sample.problem;
    $("screen").hidden = !sample.frames.length;
    document.querySelector(".player").classList.toggle("blind", !sample.frames.length);
    state.images = sample.frames.map((uri) => { const image = new Image(); image.src = uri; return image; });
    state.heat = sample.heat && bytes(sample.heat);
    $("heat-view").hidden = !state.heat;
    $("frame").max = Math.max(sample.frames.length - 1, 0);
    state.at = Math.min(state.at, sample.frames.length - 1);
    chooseJob();
    Promise.all(state.images.map((image) => image.decode())).then(() => { if (state.sample === sample) draw(); });
  }

  function chooseJob() {
    const view = state.view = state.sample.views.find((other) => String(other.job) === $("job").value);
    state.kept = view.kept === null ? null : bytes(view.kept);
    tell(view);
    draw();
  }

  const keeps = (token) => state.kept === null || (state.kept[token >> 3] >> (7 - (token & 7))) & 1;

  function show(at) {
    state.at = at;
    $("frame").value = at;
    draw();
  }

  function draw() {
    const { sample, view, at } = state;
    if (!sample.frames.length || !state.images[at].complete) return;
    const [frames, height, width, newline] = sample.grid, place = sample.shown[at], first = place * height * width;
    const image = state.images[at];
    let here = 0;
    for (let cell = 0; cell < height * width; cell++) here += keeps(first + cell) ? 1 : 0;
    paintKept(image, first, height, width);
    if (state.heat) paintHeat(image, first, height, width);
    paintStrip();
    $("time").textContent = `frame ${place + 1} of ${frames}, ${sample.seconds[at].toFixed(1)} s`;
    const whole = state.kept === null ? "this drafter chose by no pruner" : `${here} of ${height * width} tokens of this frame`;
    const line = newline && state.kept ? `; newline token ${keeps(frames * height * width) ? "kept" : "dropped"}` : "";
    $("kept-note").textContent = `kept: ${whole}${line}`;
    if (state.heat) $("heat-note").textContent = `the target's attention, to ${sample.top.toFixed(1)} times the mean`;
    document.body.dataset.frame = place;
  }

  function canvasOf(id, image) {
    const canvas = $(id);
    canvas.width = image.naturalWidth * 2; canvas.height = image.naturalHeight * 2;
    return [canvas.getContext("2d"), canvas.width, canvas.height];
  }

  function paintKept(image, first, height, width) {
    const [pen, w, h] = canvasOf("kept", image);
    pen.drawImage(image, 0, 0, w, h);
    if ($("whole").checked || state.kept === null) return;
    const x = (column) => Math.round(column * w / width), y = (row) => Math.round(row * h / height);
    pen.fillStyle = "rgba(12, 14, 20, .8)";
    for (let row = 0; row < height; row++) for (let column = 0; column < width; column++)
      if (!keeps(first + row * width + column)) pen.fillRect(x(column), y(row), x(column + 1) - x(column), y(row + 1) - y(row));
    // The border of what is kept: a dark scene's bright and dim look alike.
    pen.strokeStyle = "#ffd34d"; pen.lineWidth = 3;
    pen.beginPath();
    const there = (row, column) => row >= 0 && row < height && column >= 0 && column < width && keeps(first + row * width + column);
    for (let row = 0; row <= height; row++) for (let column = 0; column <= width; column++) {
      if (column < width && there(row, column) != there(row - 1, column)) { pen.moveTo(x(column), y(row)); pen.lineTo(x(column + 1), y(row)); }
      if (row < height && there(row, column) != there(row, column - 1)) { pen.moveTo(x(column), y(row)); pen.lineTo(x(column), y(row + 1)); }
    }
    pen.stroke();
  }

  function paintHeat(image, first, height, width) {
    const [pen, w, h] = canvasOf("heat", image);
    pen.drawImage(image, 0, 0, w, h);
    const x = (column) => Math.round(column * w / width), y = (row) => Math.round(row * h / height);
    for (let row = 0; row < height; row++) for (let column = 0; column < width; column++) {
      const value = state.heat[first + row * width + column] / 255;
      pen.fillStyle = `rgba(${heatColour(value)}, ${0.62 + 0.2 * value})`;
      pen.fillRect(x(column), y(row), x(column + 1) - x(column), y(row + 1) - y(row));
    }
  }

  // How much of each frame is kept, and how hot it is.
  function paintStrip() {
    const { sample, at } = state, [, height, width] = sample.grid, per = height * width;
    const canvas = $("strip"), w = canvas.width = 2 * (canvas.clientWidth || 300), h = canvas.height = 80;
    const pen = canvas.getContext("2d"), count = sample.shown.length, step = w / count;
    const shares = sample.shown.map((place) => {
      let kept = 0;
      for (let cell = 0; cell < per; cell++) kept += keeps(place * per + cell) ? 1 : 0;
      return kept / per;
    });
    const top = Math.max(...shares, 1e-6);
    shares.forEach((share, i) => {
      pen.fillStyle = css(i === at ? "--accent" : "--line");
      const tall = Math.max(4, share / top * (h - 8));
      pen.fillRect(i * step + 1, h - tall, Math.max(step - 2, 1), tall);
    });
  }

  // Words, in the order in which they came. Texts are a model's: nodes, never markup.
  function tell(view) {
    const answer = $("answer");
    answer.replaceChildren();
    const word = (kind, text, title) => {
      if (!text) return;
      const span = document.createElement("span"), start = text.trimStart();
      span.className = kind; span.textContent = start; span.title = title;
      answer.append(text.slice(0, text.length - start.length), span);
    };
    view.rounds.forEach(([accepted, refused, own], number) => {
      const title = number ? `round ${number}: ${accepted.length} accepted` : "the prefill's own token";
      word("accepted", accepted.join(""), title);
      if ($("refused").checked) word("refused", refused.join(""), `${title}, then refused`);
      word("own", own, title);
    });
    if (!view.rounds.length) answer.textContent = view.text;
    const mean = view.accepted_per_round === null ? "" : `, ${view.accepted_per_round.toFixed(2)} accepted per round`;
    const kept = view.kept_tokens === null ? "" : `; the drafter saw ${view.kept_tokens} of ${view.video_tokens} video tokens`;
    $("result").textContent = `${view.verdict}: ${view.new_tokens} tokens in ${Math.max(view.rounds.length - 1, 0)} rounds${mean}${kept}`
      + (state.sample.answer ? `. Right answer: ${state.sample.answer}` : "");
  }

  function play(on) {
    clearInterval(state.timer);
    state.timer = on ? setInterval(() => show((state.at + 1) % state.images.length), 450) : null;
    $("play").textContent = on ? "❚❚" : "▶";
    $("play").setAttribute("aria-label", on ? "pause" : "play");
  }

  data.samples.forEach((sample, number) => option($("sample"), number, sample.title));
  $("sample").addEventListener("change", () => chooseSample(Number($("sample").value)));
  $("job").addEventListener("change", chooseJob);
  $("play").addEventListener("click", () => play(state.timer === null));
  $("frame").addEventListener("input", () => { play(false); show(Number($("frame").value)); });
  $("whole").addEventListener("change", draw);
  $("refused").addEventListener("change", () => tell(state.view));
  const seek = (event) => {
    if (!event.buttons) return;
    const box = $("strip").getBoundingClientRect(), share = (event.clientX - box.left) / box.width;
    play(false);
    show(Math.max(0, Math.min(state.images.length - 1, Math.floor(share * state.images.length))));
  };
  $("strip").addEventListener("pointerdown", seek);
  $("strip").addEventListener("pointermove", seek);
  window.addEventListener("resize", draw);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  chooseSample(0);
}
}
