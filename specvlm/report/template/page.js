// A module, after the one of results/page.
const json = (id) => JSON.parse($(id).textContent);

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

// ---- the player ----------------------------------------------------------------------------------------------------------
const data = json("data");
if (data.samples.length) {
  const state = { sample: null, view: null, heat: null };
  const player = new Player((image, first, height, width) => { if (state.heat) paintHeat(image, first, height, width); });
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
    state.heat = sample.heat && bytes(sample.heat);
    $("heat-view").hidden = !state.heat;
    player.open(sample, null);
    chooseJob();
  }

  function chooseJob() {
    const view = state.view = state.sample.views.find((other) => String(other.job) === $("job").value);
    player.kept = view.kept === null ? null : bytes(view.kept);
    tell(view);
    player.draw();
  }

  function paintHeat(image, first, height, width) {
    const [pen, x, y] = player.canvas("heat", image, height, width);
    for (let row = 0; row < height; row++) for (let column = 0; column < width; column++) {
      const value = state.heat[first + row * width + column] / 255;
      pen.fillStyle = `rgba(${heatColour(value)}, ${0.62 + 0.2 * value})`;
      pen.fillRect(x(column), y(row), x(column + 1) - x(column), y(row + 1) - y(row));
    }
    $("heat-note").textContent = `the target's attention, to ${state.sample.top.toFixed(1)} times the mean`;
  }

  // Words, in the order in which they came.
  function tell(view) {
    const answer = $("answer");
    answer.replaceChildren();
    view.rounds.forEach(([accepted, refused, own], number) => {
      const title = number ? `round ${number}: ${accepted.length} accepted` : "the prefill's own token";
      addWord(answer, "accepted", accepted.join(""), title);
      if ($("refused").checked) addWord(answer, "refused", refused.join(""), `${title}, then refused`);
      addWord(answer, "own", own, title);
    });
    if (!view.rounds.length) answer.textContent = view.text;
    const mean = view.accepted_per_round === null ? "" : `, ${view.accepted_per_round.toFixed(2)} accepted per round`;
    const kept = view.kept_tokens === null ? "" : `; the drafter saw ${view.kept_tokens} of ${view.video_tokens} video tokens`;
    $("result").textContent = `${view.verdict}: ${view.new_tokens} tokens in ${Math.max(view.rounds.length - 1, 0)} rounds${mean}${kept}`
      + (state.sample.answer ? `. Right answer: ${state.sample.answer}` : "");
  }

  data.samples.forEach((sample, number) => option($("sample"), number, sample.title));
  $("sample").addEventListener("change", () => chooseSample(Number($("sample").value)));
  $("job").addEventListener("change", chooseJob);
  $("refused").addEventListener("change", () => tell(state.view));
  chooseSample(0);
}
