// Planning of decodeAttention and streamAttention, and their way to the instruction set chosen at run time.
#include "attention/part.h"
#include "attention/stream_attention.h"

namespace heddle {

HEDDLE_DEFINE_OP(decode_parts, DecodeAttentionArgs)
HEDDLE_DEFINE_OP(stream_parts, StreamAttentionArgs)

Status stream_attention(const StreamAttentionArgs& args, const Exec& exec) {
  const AttentionProblem& p = args.problem;
  StreamAttentionArgs planned = args;
  planned.first_part = args.offset / kDecodePart;
  planned.parts = args.tokens ? (args.offset + args.tokens - 1) / kDecodePart - planned.first_part + 1 : 0;
  const int64_t rows = p.queries * p.query_heads, tiles = (p.queries * p.group() + kPartRows - 1) / kPartRows;
  AlignedBuffer<float> partial(static_cast<size_t>(planned.parts * rows * decode_row_floats(p)));
  AlignedBuffer<char> packed(static_cast<size_t>(p.key_heads * tiles * part_query_bytes(p.head_dim)));
  if (!partial || !packed) return kNoMemory;
  planned.partial = partial.data();
  planned.packed = packed.data();
  return stream_parts(planned, exec);
}

Status decode_attention(const DecodeAttentionArgs& args, const Exec& exec) {
  const AttentionProblem& p = args.problem;
  DecodeAttentionArgs planned = args;
  AlignedBuffer<int64_t> first(2 * static_cast<size_t>(p.batch) + 1);
  if (!first) return kNoMemory;
  int64_t* offset = first.data() + p.batch + 1;
  first[0] = 0;
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t oldest = args.lengths[b] - p.queries - p.left;  // the first key that any query sees
    offset[b] = p.left < 0 || oldest < 0 ? 0 : oldest / kDecodePart;
    first[b + 1] = first[b] + (args.lengths[b] + kDecodePart - 1) / kDecodePart - offset[b];
  }
  planned.first_part = first.data();
  planned.part_offset = offset;
  planned.partial_floats = p.queries * p.group() * decode_row_floats(p);
  AlignedBuffer<float> partial(static_cast<size_t>(first[p.batch] * p.key_heads * planned.partial_floats));
  const int64_t tiles = p.batch * p.key_heads * ((p.queries * p.group() + kPartRows - 1) / kPartRows);
  AlignedBuffer<char> packed(static_cast<size_t>(tiles * part_query_bytes(p.head_dim)));
  if (!partial || !packed) return kNoMemory;
  planned.packed = packed.data();
  planned.partial = partial.data();
  return decode_parts(planned, exec);
}

}  // namespace heddle
