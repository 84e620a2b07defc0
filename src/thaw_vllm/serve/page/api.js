// Requests to this server. The session is in a cookie that scripts cannot read.

export class RefusedError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

export class LostError extends Error {}

const PATIENCE = 15000; // milliseconds

// The answer's document. POSTs may take as long as a model takes to start.
export async function ask(path, body) {
  const writing = body !== undefined;
  let answer;
  let document = null;
  try {
    answer = await fetch(path, {
      method: writing ? "POST" : "GET",
      cache: "no-store",
      credentials: "same-origin",
      headers: writing ? { "Content-Type": "application/json" } : {},
      body: writing ? JSON.stringify(body) : undefined,
      signal: writing ? undefined : AbortSignal.timeout(PATIENCE),
    });
    document = await answer.json();
  } catch (error) {
    if (answer === undefined || !(error instanceof SyntaxError)) {
      throw new LostError("the server does not answer");
    }
  }
  if (answer.ok && document !== null) return document;
  throw new RefusedError(answer.status, document?.error?.message ?? `the server answered ${answer.status}`);
}
