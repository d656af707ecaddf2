// The page: a video, a chat about it, what the drafter saw, and the speed beside the target alone.
import { Problem, call, stream, useKey } from "./calls.js";
import { Player, addWord, bytes } from "./player.js";

const $ = (id) => document.getElementById(id);
const state = { info: null, video: null, turns: [], shown: [], running: null, choosing: 0 };
const player = new Player();

function made(kind, name = "", text = "") {
  const element = document.createElement(kind);
  element.className = name; element.textContent = text;
  return element;
}

function button(text, act) {
  const found = made("button", "quiet", text);
  found.type = "button";
  found.addEventListener("click", act);
  return found;
}

// ---- errors -----------------------------------------------------------------------------------------------------------
function tell(error) {
  $("problem").textContent = error ? error.message : "";
  $("problem").hidden = !error;
  if (error?.status === 401) {
    $("key-form").hidden = false;
    $("key").focus();
  } else if (error && !(error instanceof Problem)) {
    $("problem").textContent = "This page has a fault. Reload it.";
    console.error(error);
  }
}

// Run something; what goes wrong is told.
async function guarded(work) {
  tell(null);
  try {
    await work();
  } catch (error) {
    tell(error);
  }
}

// ---- the server ---------------------------------------------------------------------------------------------------------
const mostBytes = () => Math.floor(state.info.limits.max_body_mib * 2 ** 20 * 0.75) - 2 ** 18; // base64, and room for the chat
const mib = (size) => `${(size / 2 ** 20).toFixed(size < 10 * 2 ** 20 ? 1 : 0)} MiB`;

async function connect() {
  const info = state.info = await (await call("specvlm/info")).json();
  $("key-form").hidden = true;
  const { pruner, drafter, verifier, ratio } = info.defaults;
  const facts = [info.model, `pruner ${pruner}`, `ratio ${ratio}`, `drafter ${drafter}`, `verifier ${verifier}`];
  $("facts").replaceChildren(...facts.map((fact) => made("span", "", fact)));
  $("limit").textContent = `up to ${mib(mostBytes())}`;
  const examples = info.clips.map((name) => button(name, () => guarded(() => chooseClip(name))));
  $("examples").replaceChildren("Examples: ", ...examples);
  $("examples").hidden = !examples.length;
}

// ---- the video ----------------------------------------------------------------------------------------------------------
// Begin a chat about a video. url: what requests name; shown: a blob for the preview.
function choose(name, url, shown) {
  cancel();
  URL.revokeObjectURL($("preview").src);
  state.video = { name, url };
  state.turns = [];
  state.shown = [];
  player.play(false);
  $("turns").replaceChildren();
  $("empty").hidden = $("chosen").hidden = $("preview").hidden = false;
  $("screen").hidden = $("saw").hidden = true;
  $("chosen").textContent = name;
  $("preview").src = URL.createObjectURL(shown);
  for (const example of $("examples").children) example.setAttribute("aria-pressed", example.textContent === name && url === `embedded:${name}`);
  if (matchMedia("(pointer: fine)").matches) $("question").focus({ preventScroll: true }); // a phone would open its keyboard
}

async function chooseClip(name) {
  const mine = ++state.choosing, clip = await (await call(`specvlm/clips/${encodeURIComponent(name)}`)).blob();
  if (mine === state.choosing) choose(name, `embedded:${name}`, clip);
}

async function chooseFile(file) {
  const mine = ++state.choosing;
  if (!state.info) await connect();
  if (file.type && !file.type.startsWith("video/")) throw new Problem(`${file.name} is not a video.`);
  if (!file.size) throw new Problem(`${file.name} is empty.`);
  const most = mostBytes();
  if (file.size > most) throw new Problem(`${file.name} has ${mib(file.size)}. This server takes at most ${mib(most)}.`);
  const url = await new Promise((found, failed) => {
    const reader = new FileReader();
    reader.addEventListener("load", () => found(reader.result));
    reader.addEventListener("error", () => failed(new Problem(`${file.name} cannot be read.`)));
    reader.readAsDataURL(file);
  });
  if (mine === state.choosing) choose(file.name, `data:video/mp4;base64,${url.slice(url.indexOf(",") + 1)}`, file);
}

async function showView(path) {
  const { videos: [video], kept: [kept] } = await (await call(path)).json();
  if (!video) return;
  $("preview").pause();
  $("preview").hidden = true;
  $("screen").hidden = $("saw").hidden = false;
  player.open(video, bytes(kept.bits));
}

// ---- the chat -----------------------------------------------------------------------------------------------------------
// Messages of the turns that have ended, and a question. The video stands in the first one.
function messages(question) {
  const ended = state.turns.flatMap((turn) => [{ role: "user", content: turn.question }, { role: "assistant", content: turn.text }]);
  const found = [...ended, { role: "user", content: question }];
  const video = { type: "video_url", video_url: { url: state.video.url } };
  found[0] = { role: "user", content: [video, { type: "text", text: found[0].content }] };
  return found;
}

// Add the elements of a turn.
function opened(question) {
  const item = made("li", "card turn"), answer = made("p", "answer"), result = made("p", "note result");
  answer.lang = "und";
  answer.setAttribute("aria-busy", "true");
  item.append(made("p", "question", question), answer, result);
  $("turns").append(item);
  $("empty").hidden = true;
  const turn = { question, text: "", rounds: [], item, answer, result };
  state.shown.push(turn);
  return turn;
}

// Run a request that Cancel ends. Returns whether it came to its end.
async function running(work) {
  const mine = state.running = new AbortController();
  $("send").disabled = true;
  $("cancel").hidden = false;
  document.body.classList.add("running");
  try {
    await work(mine.signal);
    return true;
  } catch (error) {
    if (error.name !== "AbortError") throw error;
    return false;
  } finally {
    if (state.running === mine) {
      state.running = null;
      $("send").disabled = false;
      $("cancel").hidden = true;
      document.body.classList.remove("running");
    }
  }
}

function cancel() {
  state.running?.abort();
}

// Keep the end of a growing answer in sight, if it was.
function growing(item, grow) {
  const end = Math.min(window.innerHeight, $("turns").getBoundingClientRect().bottom + 1);
  const seen = item.getBoundingClientRect().bottom <= end;
  grow();
  if (seen) item.scrollIntoView({ block: "nearest" });
}

function write(turn, { round, accepted, refused, own }) {
  const title = round ? `round ${round}: ${accepted.length} accepted` : "the prefill's own token";
  addWord(turn.answer, "accepted", accepted.join(""), title);
  if ($("refused").checked) addWord(turn.answer, "refused", refused.join(""), `${title}, then refused`);
  addWord(turn.answer, "own", own, title);
}

async function ask(question) {
  if (state.running) return;
  if (!state.video) throw new Problem("Choose a video first.");
  const asked = { model: state.info.model, messages: messages(question) }, video = state.video, turn = opened(question);
  $("question").value = "";
  grow();
  turn.item.scrollIntoView({ block: "nearest" });
  try {
    const ended = await running(async (signal) => {
      for await (const chunk of stream({ ...asked, specvlm: { explain: true } }, signal)) take(turn, chunk, video);
    });
    if (ended) finish(turn, asked, video);
    else leave(turn, "cancelled");
  } catch (error) {
    leave(turn, "not finished");
    throw error;
  } finally {
    turn.answer.removeAttribute("aria-busy");
  }
}

function take(turn, chunk, video) {
  turn.text += chunk.choices[0]?.delta.content ?? "";
  if (chunk.usage) turn.numbers = chunk;
  if (chunk.specvlm?.round) {
    turn.rounds.push(chunk.specvlm.round);
    growing(turn.item, () => write(turn, chunk.specvlm.round));
  }
  if (chunk.specvlm?.view && video === state.video) showView(chunk.specvlm.view).catch(tell);
}

// A turn without a whole answer is no part of the chat; its question can be asked again.
function leave(turn, why) {
  if (!turn.item.isConnected) return; // of another video
  if (!turn.answer.hasChildNodes()) turn.item.remove();
  turn.item.classList.add("left");
  turn.result.textContent = `${why}: no part of the chat`;
  $("empty").hidden = $("turns").hasChildNodes();
  $("said").textContent = why;
  if (!$("question").value) $("question").value = turn.question;
  grow();
}

function finish(turn, asked, video) {
  if (video !== state.video) return;
  const { specvlm, usage, metrics: { speculative_decoding: counts } } = turn.numbers;
  const mean = counts.num_spec_steps ? `, ${(counts.num_accepted_draft_tokens / counts.num_spec_steps).toFixed(2)} accepted per round` : "";
  const kept = specvlm.kept_tokens === null ? "" : `; the drafter saw ${specvlm.kept_tokens} of ${specvlm.video_tokens} video tokens`;
  growing(turn.item, () => {
    turn.result.textContent = `${turn.text ? "" : "an empty answer: "}${usage.completion_tokens} tokens in ${specvlm.rounds} rounds${mean}${kept}`;
    const compare = button("Compare with the target alone", () => guarded(() => beside(turn, asked, compare)));
    turn.item.append(compare);
  });
  $("said").textContent = turn.text; // whole, without refused words, for a screen reader
  state.turns.push(turn);
}

// ---- beside the target alone --------------------------------------------------------------------------------------------
// A time of one run is noise beyond its second digit.
const rounded = (value) => value < 10 ? value.toPrecision(2) : Number(value.toPrecision(2)).toString();

function bar(name, speed, most) {
  const row = made("div", "bar"), track = made("span", "track"), part = made("span", "part");
  part.style.width = `${most ? 100 * speed / most : 0}%`;
  track.append(part);
  row.append(made("span", "", name), track, made("span", "speed", speed ? `≈ ${rounded(speed)} tokens/s` : "too short to time"));
  return row;
}

// Ask the same of the target alone, with the same seed, and compare answers and speeds.
async function beside(turn, asked, compare) {
  if (state.running) return;
  compare.disabled = true;
  const place = made("div", "beside"), answer = made("p", "answer alone");
  answer.lang = "und";
  place.append(made("h3", "", "The target alone"), answer);
  turn.item.append(place);
  const body = { ...asked, seed: turn.numbers.specvlm.seed, specvlm: { speculate: false } };
  let numbers = null, ended = false;
  try {
    ended = await running(async (signal) => {
      for await (const chunk of stream(body, signal)) {
        growing(place, () => { answer.textContent += chunk.choices[0]?.delta.content ?? ""; });
        if (chunk.usage) numbers = chunk;
      }
    });
  } finally {
    compare.disabled = false;
    if (!ended) place.remove();
  }
  if (!ended) return;
  compare.remove();
  compared(turn, place, answer, numbers);
}

function compared(turn, place, answer, numbers) {
  const same = answer.textContent === turn.text;
  const [ours, alone] = [turn.numbers, numbers].map((one) => one.specvlm.tokens_per_second ?? 0), most = Math.max(ours, alone);
  const verdict = made("p", `verdict ${same ? "good" : turn.numbers.specvlm.lossless ? "bad" : "open"}`, same ? "identical" : "different");
  const times = ours && alone ? `Speed-up ${rounded(ours / alone)}. ` : "";
  growing(place, () => {
    answer.before(verdict);
    if (same) answer.remove();
    place.append(bar("the pair", ours, most), bar("the target alone", alone, most));
    place.append(made("p", "note", `${times}From one run each, without the first token: other requests and noise change it.`));
  });
  $("said").textContent = `${verdict.textContent} answers. ${times}`;
}

// ---- keys and clicks ------------------------------------------------------------------------------------------------------
// As tall as its text, up to a bound of the style.
function grow() {
  $("question").style.height = "auto";
  $("question").style.height = `${$("question").scrollHeight + 2}px`;
}

function send() {
  const question = $("question").value.trim();
  if (question) guarded(() => ask(question));
}

$("ask").addEventListener("submit", (event) => { event.preventDefault(); send(); });
$("question").addEventListener("input", grow);
$("question").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send();
});
$("cancel").addEventListener("click", () => { cancel(); $("question").focus(); });
document.addEventListener("keydown", (event) => { if (event.key === "Escape") cancel(); });
$("refused").addEventListener("change", () => state.shown.forEach((turn) => {
  turn.answer.replaceChildren();
  turn.rounds.forEach((round) => write(turn, round));
}));
$("preview").addEventListener("error", () => { $("preview").hidden = true; }); // the server may read what the browser cannot
$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  guarded(async () => {
    useKey($("key").value.trim());
    $("key").value = "";
    await connect();
    $("question").focus();
  });
});
$("file").addEventListener("change", () => {
  const [file] = $("file").files;
  if (file) guarded(() => chooseFile(file));
  $("file").value = ""; // so that the same file can be chosen again
});
for (const kind of ["dragenter", "dragover", "dragleave", "drop"]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault(); // the browser would open the file
    $("drop").classList.toggle("over", kind === "dragenter" || kind === "dragover");
    const file = kind === "drop" ? event.dataTransfer?.files[0] : null;
    if (file) guarded(() => chooseFile(file));
  });
}
guarded(connect);
