// Streams one answer of a starmesh cluster to the terminal. What it shows, and its flags: ../README.md.

import { readFileSync } from "node:fs";
import { setTimeout as sleep } from "node:timers/promises";
import { fileURLToPath } from "node:url";
import { parseArgs } from "node:util";

import grpc from "@grpc/grpc-js";
import protoLoader from "@grpc/proto-loader";

const RESUMES = 8; // tries to go on after the last message that came
const CALL_TIMEOUT_MS = 10_000;

function readArguments() {
  const { values, positionals } = parseArgs({
    allowPositionals: true,
    options: {
      tokens: { type: "string", default: "256" },
      "request-id": { type: "string", default: "" },
      deadline: { type: "string", default: "300" },
      "resume-window": { type: "string", default: "10" },
      "cancel-after": { type: "string", default: "0" },
      ca: { type: "string", default: "" },
      "api-key": { type: "string", default: process.env.STARMESH_API_KEY ?? "" },
    },
  });
  const [address, prompt] = positionals;
  if (positionals.length !== 2) throw new Error("give an address and a prompt");
  return { ...values, ca: values.ca && readFileSync(values.ca), address, prompt };
}

// The messages and services as plain objects, read from the .proto files when the program starts.
const directory = (relative) => fileURLToPath(new URL(relative, import.meta.url));
const definitions = protoLoader.loadSync(["starmesh/v1/inference.proto", "google/rpc/error_details.proto"], {
  includeDirs: [directory("../../protos"), directory("../protos")],
  keepCase: true,
  enums: String,
  longs: Number,
  defaults: true,
});

function connect({ address, ca, "api-key": key }) {
  const credentials = ca ? grpc.credentials.createSsl(ca) : grpc.credentials.createInsecure();
  const { InferenceService } = grpc.loadPackageDefinition(definitions).starmesh.v1;
  // Notices within half a minute that a silent network has lost the router, and looks for it again within a second.
  const client = new InferenceService(address, credentials, {
    "grpc.keepalive_time_ms": 20_000,
    "grpc.keepalive_timeout_ms": 10_000,
    "grpc.max_reconnect_backoff_ms": 1_000,
  });
  const metadata = new grpc.Metadata();
  if (key) metadata.set("authorization", `Bearer ${key}`);
  return { client, metadata };
}

const duration = (seconds) => ({ seconds: Math.floor(seconds), nanos: Math.round((seconds % 1) * 1e9) });
const seconds = ({ seconds, nanos }) => seconds + nanos / 1e9;

// An error's google.rpc details, by the names of their types. They travel as a google.rpc.Status, which has the same
// fields as starmesh.v1.SequenceStatus.
function details(error) {
  const [packed] = error.metadata?.get("grpc-status-details-bin") ?? [];
  if (!packed) return {};
  const status = definitions["starmesh.v1.SequenceStatus"].deserialize(packed);
  return Object.fromEntries(
    status.details.flatMap(({ type_url, value }) => {
      const name = type_url.split("/").pop();
      const type = definitions[name];
      return type ? [[name, type.deserialize(value)]] : [];
    }),
  );
}

// What a person does about an error, in one line.
function nextStep(error) {
  const { "google.rpc.BadRequest": bad, "google.rpc.RetryInfo": retry } = details(error);
  if (bad) return bad.field_violations.map(({ field, description }) => `change ${field}: ${description}`).join("; ");
  if (retry) return `ask again after ${seconds(retry.retry_delay)} s`;
  switch (error.code) {
    case grpc.status.UNAUTHENTICATED:
      return "give a valid key with --api-key";
    case grpc.status.PERMISSION_DENIED:
      return "use a key that may do this";
    case grpc.status.DEADLINE_EXCEEDED:
      return "what was printed stays valid; allow more time with --deadline";
    case grpc.status.UNAVAILABLE:
      return "see whether a router listens there, and whether it wants TLS (--ca)";
    default:
      return "see the message";
  }
}

async function main(asked) {
  const { client, metadata } = connect(asked);
  const window = Number(asked["resume-window"]);
  const cancelAfter = Number(asked["cancel-after"]);
  const deadline = Date.now() + Number(asked.deadline) * 1000;
  let requestId = asked["request-id"];
  let tokens = 0;
  let resumes = 0;
  let cancelled = false;
  let call = client.Generate(
    {
      request_id: requestId,
      chat: { messages: [{ role: "user", content: asked.prompt }] },
      sampling: { max_output_tokens: Number(asked.tokens) },
      resume_window: duration(window),
    },
    metadata,
    { deadline },
  );
  for (let triesLeft = RESUMES; ; triesLeft--) {
    try {
      for await (const response of call) {
        triesLeft = RESUMES;
        requestId = response.request_id;
        tokens = response.offset + response.token_ids.length;
        process.stdout.write(response.text);
        if (response.finish_reason !== "FINISH_REASON_UNSPECIFIED") {
          const { prompt_tokens, output_tokens, recoveries, migrations } = response.usage;
          console.error(
            `\n[${response.finish_reason.replace("FINISH_REASON_", "")}: ${prompt_tokens} prompt tokens, ` +
              `${output_tokens} output tokens, ${recoveries} recoveries, ${migrations} migrations, ${resumes} resumes]`,
          );
        } else if (cancelAfter && tokens >= cancelAfter && !cancelled) {
          cancelled = true;
          if (window) await cancelRequest(client, metadata, requestId);
          else call.cancel(); // enough where no stream of the request can follow
        }
      }
      return 0;
    } catch (error) {
      if (cancelled && error.code === grpc.status.CANCELLED) {
        console.error(`\n[cancelled by ending the call: ${tokens} output tokens]`);
        return 0;
      }
      // The router keeps the request for the resume window: go on behind the last token that came.
      const broken = error.code === grpc.status.UNAVAILABLE && !details(error)["google.rpc.RetryInfo"];
      if (!broken || !window || !tokens || triesLeft <= 0) throw error;
      resumes++;
      await sleep(Math.min(1000, 100 * 2 ** (RESUMES - triesLeft)));
      call = client.Resume({ request_id: requestId, offset: tokens }, metadata, { deadline });
    }
  }
}

const cancelRequest = (client, metadata, requestId) =>
  new Promise((resolve, reject) =>
    client.Cancel({ request_id: requestId }, metadata, { deadline: Date.now() + CALL_TIMEOUT_MS }, (error) =>
      error && error.code !== grpc.status.NOT_FOUND ? reject(error) : resolve(), // NOT_FOUND: it has just ended
    ),
  );

let asked;
try {
  asked = readArguments();
} catch (error) {
  console.error(`${error.message}; usage: node client.js ADDRESS PROMPT [flags, see ../README.md]`);
  process.exit(2);
}
try {
  process.exitCode = await main(asked);
} catch (error) {
  if (error.code === undefined) throw error;
  console.error(`\nerror: ${grpc.status[error.code]}: ${error.details}\nnext: ${nextStep(error)}`);
  process.exitCode = 1;
}
