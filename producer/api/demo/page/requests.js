// The requests that the page makes. Each ends in an answer or in a Refused, never in another error.

export class Refused extends Error {
  constructor(why) {
    super(String(why));
    this.why = why; // an HTTP status, or "away"
  }
}

const TIMEOUT = 10_000; // ms; a request for a code has the timeout of the API

let key = ""; // in memory only

export const useKey = (given) => {
  key = given;
};

const send = async (path, { body, signal } = {}) => {
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
  const response = await send(path, { ...options, signal: AbortSignal.timeout(TIMEOUT) });
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

// Calls `receive` with each line of the answer as it comes; returns the last one, which has the error.
export const request = async (email, locale, receive) => {
  const response = await send("/demo/request", { body: { email, locale } });
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
        receive(last);
      }
    }
  } catch {
    throw new Refused("away");
  }
  if (last === null || last.error === undefined) throw new Refused("away");
  return last;
};
