// Runs a package that torch._inductor.aoti_compile_and_package made: no Python, no model code.
//
//   run_package PACKAGE INPUTS OUTPUTS
//
// INPUTS: a list of tensors that Python wrote with torch.save, the program's flat inputs in their
// order. OUTPUTS: where the tuple of flat outputs goes, for torch.load. Exit status 1 with the reason
// on stderr when the program refuses its inputs.

#include <fstream>
#include <iostream>
#include <iterator>
#include <vector>

#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/torch.h>

static std::vector<char> read(const char* path) {
  std::ifstream file(path, std::ios::binary);
  TORCH_CHECK(file, "cannot read ", path);
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

int main(int argc, char** argv) {
  if (argc != 4) {
    std::cerr << "usage: run_package PACKAGE INPUTS OUTPUTS\n";
    return 2;
  }
  try {
    c10::InferenceMode inference;
    torch::inductor::AOTIModelPackageLoader loader(argv[1]);
    std::vector<at::Tensor> inputs;
    const auto given = torch::pickle_load(read(argv[2]));
    for (const auto& input : given.toListRef()) {
      inputs.push_back(input.toTensor());
    }
    auto outputs = loader.run(inputs);
    for (const auto& output : outputs) {
      std::cout << output.dtype() << " " << output.sizes() << "\n";
    }
    // A tuple: lists are written with their type, which torch.load takes for code.
    std::vector<c10::IValue> values(outputs.begin(), outputs.end());
    auto bytes = torch::pickle_save(c10::ivalue::Tuple::create(std::move(values)));
    std::ofstream(argv[3], std::ios::binary).write(bytes.data(), bytes.size());
  } catch (const std::exception& error) {
    std::cerr << error.what() << "\n";
    return 1;
  }
  return 0;
}
