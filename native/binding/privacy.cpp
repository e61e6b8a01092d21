// heddle/privacy for JavaScript: reads arguments in the order in which lib/privacy/layer.ts passes them.
#include "binding/addon.h"
#include "binding/call.h"
#include "binding/cuda.h"
#include "privacy/clipped_gradients.h"
#include "privacy/convolution.h"
#include "privacy/discrete_noise.h"
#include "privacy/experts.h"
#include "privacy/gaussian_noise.h"
#include "privacy/lora.h"
#include "privacy/per_sample_squared_norms.h"
#include "privacy/tied_embedding.h"

namespace heddle::binding {
namespace {

RowSource row_source(Call& call, int64_t stride) {
  RowSource s;
  s.data = call.array<const void>();
  s.type = call.dtype();
  s.stride = stride;
  return s;
}

RowLayer row_layer(Call& call) {
  RowLayer l;
  l.samples = call.integer();
  l.positions = call.integer();
  l.input_count = call.integer();
  l.output_count = call.integer();
  l.inputs = row_source(call, l.input_count);
  l.grad_outputs = row_source(call, l.output_count);
  l.indices = call.array<const int32_t>();
  l.padding_index = call.integer();
  l.mask = call.array<const uint8_t>();
  l.bias = call.boolean();
  return l;
}

// Norms of one layer kind: `read` takes the layer's arguments.
template <class Args, auto read, Status (*kernel)(const Args&, const Exec&)>
Napi::Value norms_of(const Napi::CallbackInfo& info) {
  Call call(info);
  Args a;
  a.layer = read(call);
  a.method = static_cast<NormMethod>(call.integer());
  a.out = call.array<float>();
  return call.submit(std::move(a), kernel);
}
template <Status (*kernel)(const NormsArgs&, const Exec&)>
constexpr auto norms = norms_of<NormsArgs, row_layer, kernel>;

// Clipped sums of one layer kind, into its parameters in the order of the front.
template <class Args, auto read, Status (*kernel)(const Args&, const Exec&), float* Args::*... parameters>
Napi::Value clipped_of(const Napi::CallbackInfo& info) {
  Call call(info);
  Args a;
  a.layer = read(call);
  a.factors = call.array<const float>();
  ((a.*parameters = call.array<float>()), ...);
  return call.submit(std::move(a), kernel);
}
template <Status (*kernel)(const ClippedArgs&, const Exec&)>
constexpr auto clipped = clipped_of<ClippedArgs, row_layer, kernel, &ClippedArgs::weight, &ClippedArgs::bias>;

ConvLayer conv_layer(Call& call) {
  ConvLayer l;
  l.samples = call.integer();
  l.in_channels = call.integer();
  l.out_channels = call.integer();
  l.groups = call.integer();
  std::memcpy(&l.shape, call.host_array<int32_t>(), sizeof l.shape);
  l.input = call.array<const void>();
  l.input_type = call.dtype();
  l.grad_outputs = call.array<const void>();
  l.grad_type = call.dtype();
  l.mask = call.array<const uint8_t>();
  l.bias = call.boolean();
  return l;
}

LoraLayer lora_layer(Call& call) {
  LoraLayer l;
  l.rows = row_layer(call);
  l.rank = call.integer();
  l.a = row_source(call, l.rows.input_count);
  l.b = row_source(call, l.rank);
  l.scale = static_cast<float>(call.number());
  return l;
}

constexpr auto conv_norms = norms_of<ConvNormsArgs, conv_layer, conv_squared_norms>;
constexpr auto conv_clipped =
    clipped_of<ConvClippedArgs, conv_layer, conv_clipped_gradients, &ConvClippedArgs::weight, &ConvClippedArgs::bias>;

TiedLayer tied_layer(Call& call) {
  TiedLayer l;
  l.samples = call.integer();
  l.positions = call.integer();
  l.width = call.integer();
  l.vocabulary = call.integer();
  l.indices = call.array<const int32_t>();
  l.padding_index = call.integer();
  l.mask = call.array<const uint8_t>();
  l.grad_embeddings = row_source(call, l.width);
  l.hidden = row_source(call, l.width);
  l.grad_logits = row_source(call, l.vocabulary);
  return l;
}

constexpr auto lora_norms = norms_of<LoraNormsArgs, lora_layer, lora_squared_norms>;
constexpr auto lora_clipped =
    clipped_of<LoraClippedArgs, lora_layer, lora_clipped_gradients, &LoraClippedArgs::a, &LoraClippedArgs::b>;
constexpr auto tied_norms = norms_of<TiedNormsArgs, tied_layer, tied_squared_norms>;
constexpr auto tied_clipped = clipped_of<TiedClippedArgs, tied_layer, tied_clipped_gradients, &TiedClippedArgs::weight>;

ExpertsLayer experts_layer(Call& call) {
  ExpertsLayer l;
  l.rows = row_layer(call);
  l.sample_of = call.array<const int32_t>();
  l.expert_of = call.array<const int32_t>();
  l.experts = call.integer();
  return l;
}

constexpr auto experts_norms = norms_of<ExpertsNormsArgs, experts_layer, experts_squared_norms>;
constexpr auto experts_clipped = clipped_of<ExpertsClippedArgs, experts_layer, experts_clipped_gradients,
                                            &ExpertsClippedArgs::weight, &ExpertsClippedArgs::bias>;

Napi::Value gaussian_noise_call(const Napi::CallbackInfo& info) {
  Call call(info);
  GaussianNoiseArgs a;
  a.key = call.array<const uint32_t>();
  a.step = call.integer();
  a.offset = call.integer();
  a.count = call.integer();
  a.stddev = static_cast<float>(call.number());
  a.add = call.boolean();
  a.out = call.array<float>();
  return call.submit(std::move(a), gaussian_noise);
}

Napi::Value discrete_noise_call(const Napi::CallbackInfo& info) {
  Call call(info);
  DiscreteNoiseArgs a;
  a.key = call.array<const uint32_t>();
  a.step = call.integer();
  a.offset = call.integer();
  a.count = call.integer();
  a.sigma = call.integer();
  a.granularity = call.number();
  a.add = call.boolean();
  a.out = call.array<float>();
  return call.submit(std::move(a), discrete_noise);
}

Napi::Value chacha20_blocks_call(const Napi::CallbackInfo& info) {
  Call call(info);
  ChaChaArgs a;
  a.key = call.array<const uint32_t>();
  a.counter = static_cast<uint32_t>(call.integer());
  a.nonce = call.array<const uint32_t>();
  a.count = call.integer();
  a.out = call.array<uint32_t>();
  return call.submit(std::move(a), chacha20_blocks);
}

}  // namespace

void register_privacy(Napi::Env env, Napi::Object exports) {
  auto add = [&](const char* name, Napi::Value (*fn)(const Napi::CallbackInfo&)) {
    exports.Set(name, Napi::Function::New(env, fn));
  };
  add("linearSquaredNorms", norms<linear_squared_norms>);
  add("embeddingSquaredNorms", norms<embedding_squared_norms>);
  add("scaleSquaredNorms", norms<scale_squared_norms>);
  add("channelSquaredNorms", norms<channel_squared_norms>);
  add("linearClippedGradients", clipped<linear_clipped_gradients>);
  add("embeddingClippedGradients", clipped<embedding_clipped_gradients>);
  add("scaleClippedGradients", clipped<scale_clipped_gradients>);
  add("channelClippedGradients", clipped<channel_clipped_gradients>);
  add("convSquaredNorms", conv_norms);
  add("convClippedGradients", conv_clipped);
  add("loraSquaredNorms", lora_norms);
  add("loraClippedGradients", lora_clipped);
  add("tiedEmbeddingSquaredNorms", tied_norms);
  add("tiedEmbeddingClippedGradients", tied_clipped);
  add("expertsSquaredNorms", experts_norms);
  add("expertsClippedGradients", experts_clipped);
  add("gaussianNoise", gaussian_noise_call);
  add("discreteNoise", discrete_noise_call);
  add("chacha20Blocks", chacha20_blocks_call);
}

void register_cuda_privacy(CudaExports& ops) {
  ops.add("linearSquaredNorms", norms<linear_squared_norms>, "heddle_cuda_linear_squared_norms");
  ops.add("embeddingSquaredNorms", norms<embedding_squared_norms>, "heddle_cuda_embedding_squared_norms");
  ops.add("scaleSquaredNorms", norms<scale_squared_norms>, "heddle_cuda_scale_squared_norms");
  ops.add("channelSquaredNorms", norms<channel_squared_norms>, "heddle_cuda_channel_squared_norms");
  ops.add("linearClippedGradients", clipped<linear_clipped_gradients>, "heddle_cuda_linear_clipped_gradients");
  ops.add("embeddingClippedGradients", clipped<embedding_clipped_gradients>, "heddle_cuda_embedding_clipped_gradients");
  ops.add("scaleClippedGradients", clipped<scale_clipped_gradients>, "heddle_cuda_scale_clipped_gradients");
  ops.add("channelClippedGradients", clipped<channel_clipped_gradients>, "heddle_cuda_channel_clipped_gradients");
  ops.add("convSquaredNorms", conv_norms, "heddle_cuda_conv_squared_norms");
  ops.add("convClippedGradients", conv_clipped, "heddle_cuda_conv_clipped_gradients");
  ops.add("loraSquaredNorms", lora_norms, "heddle_cuda_lora_squared_norms");
  ops.add("loraClippedGradients", lora_clipped, "heddle_cuda_lora_clipped_gradients");
  ops.add("tiedEmbeddingSquaredNorms", tied_norms, "heddle_cuda_tied_squared_norms");
  ops.add("tiedEmbeddingClippedGradients", tied_clipped, "heddle_cuda_tied_clipped_gradients");
  ops.add("expertsSquaredNorms", experts_norms, "heddle_cuda_experts_squared_norms");
  ops.add("expertsClippedGradients", experts_clipped, "heddle_cuda_experts_clipped_gradients");
  ops.add("gaussianNoise", gaussian_noise_call, "heddle_cuda_gaussian_noise");
  ops.add("discreteNoise", discrete_noise_call, "heddle_cuda_discrete_noise");
  ops.add("chacha20Blocks", chacha20_blocks_call, "heddle_cuda_chacha20_blocks");
}

}  // namespace heddle::binding
