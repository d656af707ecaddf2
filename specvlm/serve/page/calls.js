// Calls of the server. The API key is kept here, in memory alone.
let key = "";

// What went wrong, in one line for the user.
export class Problem extends Error {
  constructor(text, status = 0) { super(text); this.status = status; }
}

const GONE = "The server does not answer. Check that it still runs, then ask again.";
const BROKEN_OFF = "The connection ended before the answer did. Check that the server still runs, then ask again.";

export function useKey(given) {
  if (!/^[\x21-\x7e]+$/.test(given)) throw new Problem("An API key has no spaces, and no letters beyond ASCII.");
  key = given;
}

const sentence = (text) => text.charAt(0).toUpperCase() + text.slice(1) + (/[.!?]$/.test(text) ? "" : ".");
const isAbort = (error) => error.name === "AbortError";

async function refusal(answer) {
  const told = (await answer.json().catch(() => null))?.error?.message;
  if (answer.status === 401) return new Problem(key ? "The server does not know this API key." : "Enter an API key first.", 401);
  const wait = Number.parseInt(answer.headers.get("retry-after") ?? "", 10);
  if (answer.status === 429) return new Problem(`The server is busy. Ask again in ${wait > 0 ? wait : "a few"} s.`, 429);
  if (answer.status === 413) return new Problem("The video is too large for this server.", 413);
  return new Problem(sentence(told || `The server answers with the status ${answer.status}`), answer.status);
}

// Fetch a path of the server. Throws Problem for errors, and what the browser throws when `options.signal` ends it.
export async function call(path, options = {}) {
  const headers = { ...options.headers, ...(key ? { authorization: `Bearer ${key}` } : {}) };
  let answer;
  try {
    answer = await fetch(path.replace(/^\/+/, ""), { ...options, headers, cache: "no-store", credentials: "same-origin" });
  } catch (error) {
    throw isAbort(error) ? error : new Problem(GONE);
  }
  if (!answer.ok) throw await refusal(answer);
  return answer;
}

// Ask for a chat completion. Yields its chunks as they come.
export async function* stream(body, signal) {
  const asked = { ...body, stream: true, stream_options: { include_usage: true } };
  const headers = { "content-type": "application/json" };
  const answer = await call("v1/chat/completions", { method: "POST", headers, body: JSON.stringify(asked), signal });
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    let part;
    try {
      part = await reader.read();
    } catch (error) {
      throw isAbort(error) ? error : new Problem(BROKEN_OFF);
    }
    if (part.done) throw new Problem(BROKEN_OFF);
    const events = (rest + part.value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Problem(sentence(chunk.error.message));
      yield chunk;
    }
  }
}
