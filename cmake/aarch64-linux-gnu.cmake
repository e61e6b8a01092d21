# Cross-compiles for 64-bit Arm and runs the tests under qemu's user mode. Static, so that no Arm libc is looked for.
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
set(CMAKE_EXE_LINKER_FLAGS_INIT "-static")
find_program(HEDDLE_QEMU NAMES qemu-aarch64-static qemu-aarch64)
if(HEDDLE_QEMU)
  set(CMAKE_CROSSCOMPILING_EMULATOR ${HEDDLE_QEMU})
endif()
