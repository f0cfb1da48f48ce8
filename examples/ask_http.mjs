// Asks for a code at the HTTP door, with nothing but Node, and prints the reply.
//
//   node ask_http.mjs a@example.com
const { VERIFY_HTTP_DOOR = "http://127.0.0.1:8081" } = process.env;

const answer = await fetch(`${VERIFY_HTTP_DOOR}/get_varifycode`, {
  method: "POST",
  body: JSON.stringify({ email: process.argv[2] }),
  // The door answers within VERIFY_REPLY_TIMEOUT, 5 s unless set; 10 s are for a door that is not there.
  signal: AbortSignal.timeout(10_000),
});
const reply = await answer.json();
console.log(JSON.stringify(reply));
process.exitCode = reply.error === 0 ? 0 : 1;
