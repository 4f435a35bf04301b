// node embed.js redis://user:password@127.0.0.1:6379/0 "a text" "another"
const { createInterface } = require("node:readline");
const { connect } = require("node:net");
const { randomUUID } = require("node:crypto");

const [url, ...texts] = process.argv.slice(2);
const { hostname, port, username, password } = new URL(url);
const id = randomUUID();
const job = {
  body: Buffer.from(JSON.stringify([[texts], {}, {}])).toString("base64"),
  "content-type": "application/json",
  "content-encoding": "utf-8",
  headers: { task: "tasks.embed", id, lang: "js", argsrepr: `${texts.length} texts`, kwargsrepr: "{}", "embedq-answer": "json" },
  properties: {
    correlation_id: id,
    delivery_tag: id,
    body_encoding: "base64",
    delivery_info: { exchange: "", routing_key: "embed" },
  },
};

const socket = connect(Number(port || 6379), hostname);
function send(...words) {
  socket.write(`*${words.length}\r\n` + words.map((word) => `$${Buffer.byteLength(word)}\r\n${word}\r\n`).join(""));
}
send("HELLO", "3", ...(password ? ["AUTH", username || "default", decodeURIComponent(password)] : []));
send("SUBSCRIBE", `celery-task-meta-${id}`); // before the job is sent: no answer is missed
send("LPUSH", "embed", JSON.stringify(job));

createInterface({ input: socket }).on("line", (line) => {
  if (line.startsWith("-")) throw new Error(line); // the server refuses a command
  if (!line.startsWith("{")) return; // not yet the answer, which is JSON and has one line
  socket.end();
  const { status, result } = JSON.parse(line);
  if (status !== "SUCCESS") return console.log(result.exc_message[0]);
  const { shape, data } = result.dense;
  console.log(...shape, Buffer.from(data, "base64").readFloatLE(0).toFixed(6));
});
