// Writes .onnx models: the few protobuf messages of onnx.proto3 that a graph of standard nodes needs.

/** Field number and wire type of protobuf. */
const VARINT = 0;
const BYTES = 2;
const FIXED32 = 5;

/** A message as a list of pieces: nesting copies nothing, so weights of a gigabyte are copied once, by `finish`. */
class Message {
  private readonly parts: Uint8Array[] = [];
  private length = 0;

  private push(part: Uint8Array): void {
    this.parts.push(part);
    this.length += part.length;
  }
  private key(field: number, wire: number): void {
    this.push(varint((field << 3) | wire));
  }
  integer(field: number, value: number): this {
    this.key(field, VARINT);
    this.push(varint(value));
    return this;
  }
  float(field: number, value: number): this {
    this.key(field, FIXED32);
    const b = Buffer.alloc(4);
    b.writeFloatLE(value);
    this.push(b);
    return this;
  }
  bytes(field: number, value: Uint8Array | string | Message): this {
    const message = value instanceof Message;
    const b = message ? null : typeof value === 'string' ? Buffer.from(value) : value;
    this.key(field, BYTES);
    this.push(varint(message ? value.length : (b as Uint8Array).length));
    for (const part of message ? value.parts : [b as Uint8Array]) this.push(part);
    return this;
  }
  finish(): Buffer {
    return Buffer.concat(this.parts, this.length);
  }
}

function varint(value: number): Buffer {
  let v = BigInt.asUintN(64, BigInt(value));
  const out: number[] = [];
  do {
    const low = Number(v & 0x7fn);
    v >>= 7n;
    out.push(v === 0n ? low : low | 0x80);
  } while (v !== 0n);
  return Buffer.from(out);
}

export const ONNX_FLOAT = 1;
export const ONNX_UINT8 = 2;
export const ONNX_INT64 = 7;

export interface OnnxTensor {
  name: string;
  type: number;
  /** -1 in an input or output: any size. */
  dims: number[];
  /** Constant value; without it the tensor is an input or output of the graph. */
  data?: ArrayBufferView;
}

export interface OnnxNode {
  op: string;
  domain?: string;
  inputs: string[];
  outputs: string[];
  /** Integers are INT attributes, `{ float }` are FLOAT, strings STRING. */
  attributes?: Record<string, number | string | { float: number }>;
}

export interface OnnxGraph {
  nodes: OnnxNode[];
  constants: OnnxTensor[];
  inputs: OnnxTensor[];
  outputs: OnnxTensor[];
}

const ATTRIBUTE = { float: 1, int: 2, string: 3 };

function attribute(name: string, value: number | string | { float: number }): Message {
  const m = new Message().bytes(1, name);
  if (typeof value === 'number') return m.integer(3, value).integer(20, ATTRIBUTE.int);
  if (typeof value === 'string') return m.bytes(4, value).integer(20, ATTRIBUTE.string);
  return m.float(2, value.float).integer(20, ATTRIBUTE.float);
}

function node(n: OnnxNode): Message {
  const m = new Message();
  for (const i of n.inputs) m.bytes(1, i);
  for (const o of n.outputs) m.bytes(2, o);
  m.bytes(4, n.op);
  for (const [name, value] of Object.entries(n.attributes ?? {})) m.bytes(5, attribute(name, value));
  return n.domain ? m.bytes(7, n.domain) : m;
}

function constant(t: OnnxTensor): Message {
  const m = new Message();
  for (const d of t.dims) m.integer(1, d);
  const data = t.data as ArrayBufferView;
  m.integer(2, t.type).bytes(8, t.name);
  return m.bytes(9, Buffer.from(data.buffer, data.byteOffset, data.byteLength));
}

function valueInfo(t: OnnxTensor): Message {
  const shape = new Message();
  for (const d of t.dims) shape.bytes(1, d < 0 ? new Message().bytes(2, 'n') : new Message().integer(1, d));
  const tensorType = new Message().integer(1, t.type).bytes(2, shape);
  return new Message().bytes(1, t.name).bytes(2, new Message().bytes(1, tensorType));
}

/** A protobuf message ends at 2 GiB; constants above this (with room for the rest) must be inputs instead. */
export const MAX_CONSTANT_BYTES = 2 ** 31 - 2 ** 20;

/** A model of one graph. */
export function onnxModel(graph: OnnxGraph): Buffer {
  const g = new Message();
  for (const n of graph.nodes) g.bytes(1, node(n));
  g.bytes(2, 'heddle-peer');
  for (const c of graph.constants) g.bytes(5, constant(c));
  for (const i of graph.inputs) g.bytes(11, valueInfo(i));
  for (const o of graph.outputs) g.bytes(12, valueInfo(o));
  const opset = (domain: string, version: number) => new Message().bytes(1, domain).integer(2, version);
  return new Message()
    .integer(1, 8) // IR version
    .bytes(7, g)
    .bytes(8, opset('', 17))
    .bytes(8, opset('com.microsoft', 1))
    .finish();
}
