// How the products of one bank are laid out in time: internal to experts.cpp.
#pragma once
#include <vector>

#include "gemm/panel.h"
#include "moe/experts.h"

namespace heddle {

// The routes of one bank, sorted by expert, cut into groups that pass over an expert's weights together, and these into
// tiles.
struct Plan {
  std::vector<int32_t> token;     // [rows]: token of each sorted row
  std::vector<int64_t> position;  // [tokens * k]: sorted row of each route, -1 without one
  std::vector<RowTile> tiles;
  struct Group {
    int32_t expert;
    int64_t first_tile, tile_count;
    int64_t begin, rows;
  };
  std::vector<Group> groups;
  int64_t rows = 0;
};

void plan_routes(Plan& p, const int32_t* indices, int64_t tokens, int64_t k, int64_t experts, int max_rows);
// Every token once, in order, to expert 0.
void plan_all(Plan& p, int64_t tokens, int max_rows);

// Runs all products of a bank. The rows' outputs, unweighted, stand at `y` [plan.rows, d] afterwards, in scratch that
// lives as long as this object and goes back to the bank with it.
class BankRun {
 public:
  Plan plan;
  const float* y = nullptr;

  Status run(const ExpertsForwardArgs& a, ExpertBank& bank, const Exec& exec);
  ~BankRun();

 private:
  ExpertBank* bank_ = nullptr;
  HugeBuffer block_;
};

}  // namespace heddle
