// What the page asks of the door. Every question ends in an answer or in a Refused, never in anything else.

export class Refused extends Error {
  constructor(why) {
    super(String(why));
    this.why = why; // an HTTP status, or "away"
  }
}

const ANSWERING = 10_000; // ms for all but a request, which takes the door's own time

let key = ""; // in memory only

export const useKey = (given) => {
  key = given;
};

const talk = async (path, { body, signal } = {}) => {
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  const options = body === undefined ? {} : { method: "POST", body: JSON.stringify(body) };
  let response;
  try {
    response = await fetch(path, { ...options, headers, signal, cache: "no-store" });
  } catch {
    throw new Refused("away");
  }
  if (!response.ok) throw new Refused(response.status);
  return response;
};

const json = async (path, options = {}) => {
  const response = await talk(path, { ...options, signal: AbortSignal.timeout(ANSWERING) });
  try {
    return await response.json();
  } catch {
    throw new Refused("away");
  }
};

export const facts = () => json("/demo/facts");
export const mails = async () => (await json("/demo/inbox")).mails;
export const mail = (id) => json(`/demo/inbox/${encodeURIComponent(id)}`);
export const check = (email, code) => json("/check_varifycode", { body: { email, varifycode: code } });

// Calls `hear` with each line of the answer as it comes; returns the last one, which has the error.
export const request = async (email, locale, hear) => {
  const response = await talk("/demo/request", { body: { email, locale } });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let last = null;
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) break;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines) {
        last = JSON.parse(line);
        hear(last);
      }
    }
  } catch {
    throw new Refused("away");
  }
  if (last === null || last.error === undefined) throw new Refused("away");
  return last;
};
