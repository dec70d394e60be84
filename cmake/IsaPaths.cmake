# Instruction-set paths. A source file belongs to a path by its suffix (_avx2, _avx512, _avx512ifma, _amx) and is the
# only kind of file compiled with more than the platform's baseline; the choice among the paths is made at run time. A
# path is left out when the compiler (or its assembler) does not know it.
#
# Sets PRIVTUNER_ISA_DEFINITIONS: PRIVTUNER_X86 and PRIVTUNER_HAVE_AVX2, _AVX512, _AVX512IFMA, _AMX as they apply.
include(CheckCXXSourceCompiles)

set(PRIVTUNER_FLAGS_avx2 -mavx2 -mfma)
set(PRIVTUNER_FLAGS_avx512 ${PRIVTUNER_FLAGS_avx2} -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni)
set(PRIVTUNER_FLAGS_avx512ifma ${PRIVTUNER_FLAGS_avx512} -mavx512ifma)
set(PRIVTUNER_FLAGS_amx ${PRIVTUNER_FLAGS_avx512ifma} -mamx-tile -mamx-int8)
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU" AND CMAKE_CXX_COMPILER_VERSION VERSION_LESS 13)
  # GCC 12 warns inside its own AVX-512 headers (its bug 105593).
  foreach(path avx512 avx512ifma amx)
    list(APPEND PRIVTUNER_FLAGS_${path} -Wno-uninitialized -Wno-maybe-uninitialized)
  endforeach()
endif()
set(PRIVTUNER_ISA_PATHS avx2 avx512 avx512ifma amx)

function(privtuner_check_path path body)
  list(JOIN PRIVTUNER_FLAGS_${path} " " CMAKE_REQUIRED_FLAGS)
  string(TOUPPER ${path} upper)
  check_cxx_source_compiles("#include <immintrin.h>\nint main() { ${body} return 0; }" PRIVTUNER_HAVE_${upper})
endfunction()

set(PRIVTUNER_ISA_DEFINITIONS)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$" AND CMAKE_SIZEOF_VOID_P EQUAL 8)
  list(APPEND PRIVTUNER_ISA_DEFINITIONS PRIVTUNER_X86)
  privtuner_check_path(
    avx2 "volatile __m256i z = _mm256_add_epi32(_mm256_set1_epi32(1), _mm256_set1_epi32(2)); volatile __m256d y = _mm256_fmadd_pd(_mm256_set1_pd(1), _mm256_set1_pd(2), _mm256_set1_pd(3)); (void)z; (void)y;"
  )
  privtuner_check_path(
    avx512 "volatile __m512i z = _mm512_dpbusd_epi32(_mm512_set1_epi32(1), _mm512_set1_epi8(2), _mm512_set1_epi8(3)); (void)z;"
  )
  privtuner_check_path(
    avx512ifma "volatile __m512i z = _mm512_madd52lo_epu64(_mm512_set1_epi64(1), _mm512_set1_epi64(2), _mm512_set1_epi64(3)); (void)z;"
  )
  privtuner_check_path(amx "_tile_dpbusd(0, 1, 2); _tile_release();")
  foreach(path IN LISTS PRIVTUNER_ISA_PATHS)
    string(TOUPPER ${path} upper)
    if(PRIVTUNER_HAVE_${upper})
      list(APPEND PRIVTUNER_ISA_DEFINITIONS PRIVTUNER_HAVE_${upper})
    endif()
  endforeach()
endif()

# Gives the ISA files of the list their flags, and drops the files whose path this compiler lacks.
function(privtuner_apply_isa_flags list_name)
  foreach(path IN LISTS PRIVTUNER_ISA_PATHS)
    set(files ${${list_name}})
    list(FILTER files INCLUDE REGEX "_${path}\\.cpp$")
    string(TOUPPER ${path} upper)
    if("PRIVTUNER_HAVE_${upper}" IN_LIST PRIVTUNER_ISA_DEFINITIONS)
      set_source_files_properties(${files} PROPERTIES COMPILE_OPTIONS "${PRIVTUNER_FLAGS_${path}}")
    elseif(files)
      list(REMOVE_ITEM ${list_name} ${files})
    endif()
  endforeach()
  set(${list_name} ${${list_name}} PARENT_SCOPE)
endfunction()
