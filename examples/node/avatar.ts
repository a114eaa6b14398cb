/**
 * A client of the contract in protos/avatar/v1: calls whose errors carry their reason, and a stream that resumes after
 * its connection breaks.
 */

import { setTimeout as sleep } from "node:timers/promises";
import { fileURLToPath } from "node:url";

import * as grpc from "@grpc/grpc-js";
import * as loader from "@grpc/proto-loader";

import type { AvatarOpened__Output } from "./gen/avatar/v1/AvatarOpened.js";
import type { AvatarServiceClient } from "./gen/avatar/v1/AvatarService.js";
import type { OpenAvatar } from "./gen/avatar/v1/OpenAvatar.js";
import type { StreamAvatarRequest } from "./gen/avatar/v1/StreamAvatarRequest.js";
import type { StreamAvatarResponse__Output } from "./gen/avatar/v1/StreamAvatarResponse.js";
import type { ProtoGrpcType } from "./gen/avatar_service.js";
import type { ProtoGrpcType as DetailTypes } from "./gen/error_details.js";
import type { ProtoGrpcType as StatusTypes } from "./gen/status.js";

/** Longest time of a call that is not a stream, in milliseconds: a picture may wait for blocks of streams. */
const CALL_MS = 90_000;
/** Delay between attempts to resume a stream, in milliseconds. */
const RETRY_MS = 200;
/** Sent messages that are kept, in bytes: more than HTTP/2 has under way on a connection that breaks. */
const MAX_KEPT_BYTES = 8 << 20;
/** Codes without a reason that mean a lost connection. */
const LOST = new Set([
  grpc.status.OK,
  grpc.status.CANCELLED,
  grpc.status.UNKNOWN,
  grpc.status.DEADLINE_EXCEEDED,
  grpc.status.INTERNAL,
  grpc.status.UNAVAILABLE,
]);
/** Reasons for which another attempt to resume may succeed. */
const TEMPORARY = new Set(["NO_CAPACITY", "SESSION_BUSY", "STAGE_LOST", "STORE_UNAVAILABLE"]);

const folder = (name: string) => fileURLToPath(new URL(`../../../${name}`, import.meta.url));

const definition = loader.loadSync(
  ["avatar/v1/avatar_service.proto", "google/rpc/status.proto", "google/rpc/error_details.proto"],
  {
    includeDirs: [folder("protos"), folder("third_party")],
    keepCase: true,
    longs: String,
    enums: String,
    defaults: true,
    oneofs: true,
  },
);
const packages: unknown = grpc.loadPackageDefinition(definition);
const { avatar, google } = packages as ProtoGrpcType & StatusTypes & DetailTypes;
const { BadRequest, ErrorInfo, RetryInfo, Status } = google.rpc;

/** An error of a call. reason: one of the table in avatar_service.proto; empty if gRPC itself ended the call. */
export class AvatarError extends Error {
  metadata: Record<string, string> = {};
  violations: { field?: string; description?: string }[] = [];
  retry_s: number | undefined;
  reason = "";

  constructor(
    message: string,
    readonly code: grpc.status,
  ) {
    super(message);
  }

  get isLostConnection(): boolean {
    return !this.reason && LOST.has(this.code);
  }
}

/** Return the error of a call, with the details that the metadata grpc-status-details-bin has. */
export function errorOf(error: grpc.ServiceError): AvatarError {
  const result = new AvatarError(error.details, error.code);
  for (const packed of error.metadata?.get("grpc-status-details-bin") ?? []) {
    for (const { type_url, value } of Status.deserialize(packed as Buffer).details) {
      if (type_url.endsWith("/google.rpc.ErrorInfo")) {
        const info = ErrorInfo.deserialize(value as Buffer);
        result.reason = info.reason;
        result.metadata = info.metadata;
      } else if (type_url.endsWith("/google.rpc.BadRequest")) {
        result.violations = BadRequest.deserialize(value as Buffer).field_violations;
      } else if (type_url.endsWith("/google.rpc.RetryInfo")) {
        const delay = RetryInfo.deserialize(value as Buffer).retry_delay;
        result.retry_s = delay ? Number(delay.seconds) + delay.nanos / 1e9 : undefined;
      }
    }
  }
  return result;
}

/** Return a client of the gateway at HOST:PORT. token: sent with every call, if not empty. */
export function connect(
  target: string,
  token = "",
  credentials = grpc.credentials.createInsecure(),
): AvatarServiceClient {
  const intercept: grpc.Interceptor = (options, next) => {
    const isStream = options.method_definition.requestStream;
    return new grpc.InterceptingCall(next({ ...options, deadline: isStream ? undefined : Date.now() + CALL_MS }), {
      start: (metadata, listener, start) => {
        if (token) metadata.set("authorization", `Bearer ${token}`);
        start(metadata, listener);
      },
    });
  };
  return new avatar.v1.AvatarService(target, credentials, {
    interceptors: [intercept],
    "grpc.max_receive_message_length": -1,
    "grpc.max_reconnect_backoff_ms": 500,
    "grpc.keepalive_time_ms": 10_000,
    "grpc.keepalive_timeout_ms": 3_000,
  });
}

/** Return the response of a call that is not a stream: `await call(client.GetSession.bind(client), { session_id })`. */
export function call<Request, Response>(
  method: (request: Request, callback: grpc.requestCallback<Response>) => grpc.ClientUnaryCall,
  request: Request,
): Promise<Response> {
  return new Promise((resolve, reject) =>
    method(request, (error, response) => (error ? reject(errorOf(error)) : resolve(response as Response))),
  );
}

/** Return a new session of the person in a picture file, in the message CreateSessionResponse. */
export async function create(client: AvatarServiceClient, picture: Buffer, seed?: string) {
  const { reference } = await call(client.CreateReference.bind(client), { picture });
  if (reference!.notice) console.log(`notice: ${reference!.notice}`);
  return (await call(client.CreateSession.bind(client), { reference_id: reference!.id, seed })).session!;
}

/** An open stream. Iterate it for the gateway's messages, frames one by one; `send` sends parts meanwhile. */
export class Stream {
  opened!: AvatarOpened__Output;
  numResumes = 0;
  private call!: ReturnType<AvatarServiceClient["StreamAvatar"]>;
  private responses!: AsyncIterator<StreamAvatarResponse__Output>;
  private sent: StreamAvatarRequest[] = [];
  private sentBytes = 0;
  private numSent = 0;
  private nextFrame = 0;
  private nextEvent = 0;
  private lastAudioUs = -1;
  private resumeMs = 0;

  constructor(
    private readonly client: AvatarServiceClient,
    private readonly opening: OpenAvatar,
  ) {}

  /** Open the stream, or with a position open it again and send what the gateway did not receive. */
  async open(resume?: { next_frame: number; next_event: number }): Promise<void> {
    const metadata = new grpc.Metadata();
    metadata.set("avatar-session", this.opening.session_id!);
    this.call = this.client.StreamAvatar(metadata);
    this.call.on("error", () => {}); // the iterator reports it
    this.responses = this.call[Symbol.asyncIterator]();
    this.call.write({ open: { ...this.opening, resume } });
    this.opened = (await this.receive()).opened!;
    if (!resume) {
      this.nextFrame = Number(this.opened.session!.next_frame);
      this.resumeMs = 1000 * (await call(this.client.GetCapabilities.bind(this.client), {})).resume_s;
    }
    const missing = this.numSent - Number(this.opened.num_messages);
    if (missing > this.sent.length) {
      throw new AvatarError("undelivered messages are no longer kept", grpc.status.DATA_LOSS);
    }
    for (const request of missing > 0 ? this.sent.slice(-missing) : []) this.call.write(request);
  }

  /** Send audio, text, an interrupt, the end of a turn or `close`. Resolves once the connection takes more. */
  async send(request: StreamAvatarRequest): Promise<void> {
    this.sent.push(request);
    this.numSent += 1;
    for (this.sentBytes += bytesOf(request); this.sentBytes > MAX_KEPT_BYTES; ) {
      this.sentBytes -= bytesOf(this.sent.shift()!);
    }
    const { call } = this;
    if (!call.write(request) && !call.destroyed) {
      await new Promise((resolve) => ["drain", "error", "close"].forEach((event) => call.once(event, resolve)));
    }
  }

  /** Break the connection, as a network does. */
  breakConnection(): void {
    this.call.cancel();
  }

  async *[Symbol.asyncIterator](): AsyncGenerator<StreamAvatarResponse__Output> {
    for (;;) {
      try {
        const response = await this.receive();
        yield* this.unseen(response);
        if (response.part === "closed") return;
      } catch (error) {
        if (!(error instanceof AvatarError) || !error.isLostConnection) throw error;
        await this.resume();
      }
    }
  }

  /** Yield a message without what arrived before a resume. */
  private *unseen(response: StreamAvatarResponse__Output): Generator<StreamAvatarResponse__Output> {
    for (const frame of response.chunk?.frames ?? (response.frame ? [response.frame] : [])) {
      if (Number(frame.index) < this.nextFrame) continue;
      this.nextFrame = Number(frame.index) + frame.num_frames;
      yield { part: "frame", frame };
    }
    if (response.event && Number(response.event.number) >= this.nextEvent) {
      this.nextEvent = Number(response.event.number) + 1;
      yield response;
    } else if (response.audio && Number(response.audio.pts_us) > this.lastAudioUs) {
      this.lastAudioUs = Number(response.audio.pts_us);
      yield response;
    } else if (response.interrupted || response.closed) {
      yield response;
    }
  }

  /** Open the stream again, on a new connection if need be, until the gateway no longer keeps the session. */
  private async resume(): Promise<void> {
    for (const end = Date.now() + this.resumeMs; ; await sleep(RETRY_MS)) {
      try {
        await this.open({ next_frame: this.nextFrame, next_event: this.nextEvent });
        this.numResumes += 1;
        return;
      } catch (error) {
        const isTemporary = error instanceof AvatarError && (error.isLostConnection || TEMPORARY.has(error.reason));
        if (!isTemporary || Date.now() > end) throw error;
      }
    }
  }

  private async receive(): Promise<StreamAvatarResponse__Output> {
    try {
      const { done, value } = await this.responses.next();
      if (!done) return value;
    } catch (error) {
      throw errorOf(error as grpc.ServiceError);
    }
    throw new AvatarError("the stream ended before all was answered", grpc.status.OK);
  }
}

function bytesOf(request: StreamAvatarRequest): number {
  const samples = (request.audio ?? request.listen)?.data as Buffer | undefined;
  return 128 + (samples?.length ?? 0) + 4 * (request.say?.text?.length ?? 0);
}
