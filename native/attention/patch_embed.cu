// patch_embed() on the device: the product of gathered, normalised pixels with a weight matrix [columns, k] as it comes.
//
// A block walks k in steps for a tile of tokens and 128 outputs. Pixels are read where they lie in the video (8
// consecutive inputs are one load where the layout has them together), widened, normalised and put into shared memory
// as rows of the product, so the unfolded video never exists. Where a thread's pixels lie follows from mixed-radix digits
// of k, which a step advances by additions. k runs in the order in which the video has the channels, planes or
// interleaved, so that inputs that follow each other are neighbours in memory; a weight of the other order, or one whose
// rows are not aligned to 16 bytes, is first copied in that order.
//
// bf16 and fp16 weights take the matrix cores, with the normalised pixels rounded to the weights' type and sums in fp32.
// fp32 weights take fp32 FMA, one chain in the order of k an output. Either way a token's bits do not depend on what is
// computed beside it: every tile runs the same instructions over k in the same order.
//
// The matrix form loads the pixels of the next step into registers, and weights two steps ahead into shared memory, while
// it multiplies; one barrier a step. Blocks beside each other share their tokens, so a frame comes from memory once and
// then from L2. With too few tokens for the device (a clip of which a tenth is kept) tiles have 32 tokens in place of 64.
//
// Floor, ViViT-B on one clip of 32 frames (16 x 14 x 14 tokens, k = 1,536, dim 768): 7.4 GFLOP are 7.5 us of an H100's
// tensor cores, about 13 us by mma.sync; 4.8 MB of uint8 video, 2.4 MB of weights and 4.8 MB of bf16 results are 3.6 us
// of its memory. Widening is 29 M pixels (each token's for 6 blocks of outputs) of 4 instructions, a permutation in place
// of a conversion among them: 7 us of issue slots beside the products. Copying weights: 1.4 us and a launch. 294 blocks are
// 2.2 a multiprocessor, of which it holds 3. Not measured on a GPU yet.
#include "attention/patch_launch.h"

namespace heddle {

HEDDLE_CUDA_OP(patch_embed, PatchEmbedDeviceArgs) {
  if (a.rows == 0 || a.columns == 0) return kOk;
  if (a.k > INT32_MAX - 64 || ceil_div(a.rows, 32) * ceil_div(a.columns, kPatchOutputs) > INT32_MAX) return kUnsupported;
  return with_float_type(a.weight_type, [&](auto tag) { return launch_patches<decltype(tag)::value>(a, job); });
}

}  // namespace heddle
