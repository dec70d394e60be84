# Instruction-set paths. A source file belongs to a path by its suffix (_avx2, _avx512, _avx512ifma, _amx) and is the
# only kind of file compiled with more than the platform's baseline; the choice among the paths is made at run time. A
# path is left out when the compiler (or its assembler) does not know it; under the sanitizers also when this processor
# does not, for that build is run where it was made, and its largest kernels take as long to compile as all the rest.
#
# Sets PRIVTUNER_ISA_PATHS, the paths of this build besides portable, and writes privtuner/math/compiled_paths.hpp.
include(CheckCXXSourceCompiles)

set(PRIVTUNER_ISA_SUFFIXES "")
set(PRIVTUNER_ISA_PATHS "")
set(PRIVTUNER_FLAGS_portable "")
set(PRIVTUNER_HAVE_portable ON)

if(PRIVTUNER_SANITIZE AND EXISTS /proc/cpuinfo)
  file(STRINGS /proc/cpuinfo features REGEX "^flags" LIMIT_COUNT 1)
endif()

# A path that extends another one by some compiler flags; `test` is a statement that needs its instructions, `feature`
# is Linux's name of the newest of them.
macro(privtuner_isa_path path base feature processors intrinsics test)
  set(PRIVTUNER_FLAGS_${path} ${PRIVTUNER_FLAGS_${base}} ${ARGN})
  list(APPEND PRIVTUNER_ISA_SUFFIXES ${path})
  if(CMAKE_SYSTEM_PROCESSOR MATCHES "${processors}" AND CMAKE_SIZEOF_VOID_P EQUAL 8 AND PRIVTUNER_HAVE_${base}
     AND (NOT features OR "${features} " MATCHES " ${feature} "))
    list(JOIN PRIVTUNER_FLAGS_${path} " " CMAKE_REQUIRED_FLAGS)
    check_cxx_source_compiles("#include ${intrinsics}\nint main() { ${test} return 0; }" PRIVTUNER_HAVE_${path})
    unset(CMAKE_REQUIRED_FLAGS)
    if(PRIVTUNER_HAVE_${path})
      list(APPEND PRIVTUNER_ISA_PATHS ${path})
    endif()
  endif()
endmacro()

set(x86 "^(x86_64|AMD64|amd64)$" "<immintrin.h>")
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU" AND CMAKE_CXX_COMPILER_VERSION VERSION_LESS 13)
  set(quiet -Wno-uninitialized -Wno-maybe-uninitialized)  # inside GCC 12's AVX-512 headers (its bug 105593)
endif()
privtuner_isa_path(avx2 portable avx2 ${x86}
  "volatile __m256i z = _mm256_add_epi32(_mm256_set1_epi32(1), _mm256_set1_epi32(2)); volatile __m256d y = _mm256_fmadd_pd(_mm256_set1_pd(1), _mm256_set1_pd(2), _mm256_set1_pd(3)); (void)z; (void)y;"
  -mavx2 -mfma)
privtuner_isa_path(avx512 avx2 avx512_vnni ${x86}
  "volatile __m512i z = _mm512_dpbusd_epi32(_mm512_set1_epi32(1), _mm512_set1_epi8(2), _mm512_set1_epi8(3)); (void)z;"
  -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni ${quiet})
privtuner_isa_path(avx512ifma avx512 avx512ifma ${x86}
  "volatile __m512i z = _mm512_madd52lo_epu64(_mm512_set1_epi64(1), _mm512_set1_epi64(2), _mm512_set1_epi64(3)); (void)z;"
  -mavx512ifma)
privtuner_isa_path(amx avx512ifma amx_int8 ${x86} "_tile_dpbusd(0, 1, 2); _tile_release();" -mamx-tile -mamx-int8)

# The one place where C++ learns which paths there are.
list(TRANSFORM PRIVTUNER_ISA_PATHS REPLACE "(.+)" "X(\\1, argument)" OUTPUT_VARIABLE entries)
list(JOIN entries " " entries)
file(CONFIGURE OUTPUT "${CMAKE_BINARY_DIR}/layers/paths/privtuner/math/compiled_paths.hpp" CONTENT
"// X(path, argument) for every instruction-set path of this build. Written by cmake/IsaPaths.cmake.
#pragma once
#define PRIVTUNER_COMPILED_PATHS(X, argument) X(portable, argument) @entries@
" @ONLY)

# Gives the ISA files of the list their flags, and drops the files whose path this build lacks.
function(privtuner_apply_isa_flags list_name)
  foreach(path IN LISTS PRIVTUNER_ISA_SUFFIXES)
    set(files ${${list_name}})
    list(FILTER files INCLUDE REGEX "_${path}\\.cpp$")
    if(path IN_LIST PRIVTUNER_ISA_PATHS)
      set_source_files_properties(${files} PROPERTIES COMPILE_OPTIONS "${PRIVTUNER_FLAGS_${path}}")
    elseif(files)
      list(REMOVE_ITEM ${list_name} ${files})
    endif()
  endforeach()
  set(${list_name} ${${list_name}} PARENT_SCOPE)
endfunction()
