// Asks the HTTP API for a code, with nothing but Node, and prints the reply.
//
//   node ask_http.mjs a@example.com
//
// API_KEY is a key of the API, where it asks for one.
const { HTTP_API = "http://127.0.0.1:8081", API_KEY } = process.env;

const answer = await fetch(`${HTTP_API}/get_varifycode`, {
  method: "POST",
  headers: API_KEY ? { Authorization: `Bearer ${API_KEY}` } : {},
  body: JSON.stringify({ email: process.argv[2] }),
  // The API answers within VERIFY_REPLY_TIMEOUT (5 s); the 10 s are for an API that is down.
  signal: AbortSignal.timeout(10_000),
});
const reply = await answer.json();
console.log(JSON.stringify(reply));
process.exitCode = reply.error === 0 ? 0 : 1;
