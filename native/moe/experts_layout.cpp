#include "moe/experts_device.h"

namespace heddle {

Status layout_expert(const LayoutExpertArgs& a, const Exec& exec) {
  const ExpertBank& bank = *a.bank;
  const auto expert = static_cast<size_t>(a.expert);
  const PackedExpert& e = bank.experts[expert];
  if (!e.down.data) return kUnsupported;
  const ExpertImage image = image_of(bank, expert);
  const std::vector<float>& first = bank.gated ? e.gate_bias : e.up_bias;
  const bool done = layout_image(image.up, e.gate_up, bank.gated, first, e.up_bias, a.out, exec) &&
                    layout_image(image.down, e.down, false, e.down_bias, e.down_bias, a.out, exec);
  return done ? kOk : kCancelled;
}

}  // namespace heddle
