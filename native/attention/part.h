// What the kernels of one part of the keys share: the pieces it lies in, its scratch, and the integer kernels.
#pragma once
#include "attention/decode_attention.h"

namespace heddle {

constexpr int kPartRows = 16;                  // rows computed together
constexpr int kMicroRows = 4;                  // rows of a micro-kernel
constexpr int kChunk = 64;                     // slots of a chunk at most
constexpr int kScoreSlack = 16;                // before the first and after the last key of a part
constexpr int kDotChunks = 4;                  // chunks whose values the integer kernels take in one go: they fit into L1
constexpr int kPartStride = kDecodePart + 48;  // floats of a row of scores: its slack, and no power of two
constexpr int kLeadBytes = 32 << 10;           // that are fetched before they are computed on, in whole chunks
constexpr int kMaxLead = 16;                   // chunks

// Slots [begin, end) of one page, at most kChunk of them from a multiple of 16 on.
struct PartChunk {
  const char *keys, *values;                // of the page and head
  const float *key_scales, *value_scales;
  int begin, end;
  int at;  // key of slot 0 inside the part: may be negative
  const char *first_key, *first_value;  // words of slot `begin`
  int64_t ahead;                        // bytes from first_value to what is fetched meanwhile
};

// Bytes between the digits of two rows of weights: [key / 4][4][key % 4], a part and a chunk on both sides.
constexpr int kDigitStride = (kDecodePart + 2 * kChunk) * 4;

// Four rows of q, each element as three signed bytes, and what takes the offset of the unsigned elements off.
struct DotQuery {
  const int32_t* words;  // [word of four dims][row][3]
  const int32_t* start;  // [row][3]
  const float* scale;    // [row]
};

// Up to 16 rows of q as the kernels want them, in one block of memory.
struct PartQuery {
  float* values;    // [row / 4][dim][row % 4]
  int32_t* words;   // [row / 4] as in DotQuery
  int32_t* start;   // [row][3]
  float* scale;     // [row]
  uint32_t* odd;    // rows that the integer kernels cannot take, as bits
};
inline int64_t part_dims(int64_t dim) { return (dim + 7) / 8 * 8; }
inline int64_t part_query_bytes(int64_t dim) { return kPartRows * (part_dims(dim) * 7 + 16) + 64; }
inline PartQuery part_query(char* base, int64_t dim) {
  PartQuery q;
  q.values = reinterpret_cast<float*>(base);
  q.words = reinterpret_cast<int32_t*>(base + kPartRows * part_dims(dim) * 4);
  q.start = reinterpret_cast<int32_t*>(base + kPartRows * part_dims(dim) * 7);
  q.scale = reinterpret_cast<float*>(q.start + kPartRows * 3);
  q.odd = reinterpret_cast<uint32_t*>(q.scale + kPartRows);
  return q;
}

// Products of int8 and int4 chunks on vpdpbusd; null where the machine lacks it.
struct DotKernels {
  // scores + (chunk.at + slot) of `rows` rows at kPartStride. `ahead`: bytes from this chunk's keys to what comes next.
  void (*scores)(bool four, const PartChunk& chunk, const DotQuery& q, int dim, int rows, float* scores, int64_t ahead);
  // sums[row][3][columns] += digits[row][key inside the part] (at kDigitStride) times values (int4: their nibbles), for
  // chunks whose ends and places are whole words.
  void (*values)(bool four, const PartChunk* chunks, int count, const uint8_t* digits, int dim, int columns, int rows,
                 int32_t* sums);
  // Three signed bytes of each element of q times `factor`; count is a multiple of 16.
  void (*split)(const float* x, float factor, int count, int8_t* hi, int8_t* mid, int8_t* lo);
  // Three bytes of each weight (at least 0) times `factor`, as [key / 4][high, middle, low, 0][key % 4]; count is a
  // multiple of 16. Their sums too.
  void (*digits)(const float* x, float factor, int count, uint8_t* out, int32_t* sums);
};
const DotKernels* dot_kernels(Isa isa);

}  // namespace heddle
