# Looks for OpenFHE and says what came of it:
#   PRIVTUNER_OPENFHE_USABLE   whether the engine can be built
#   PRIVTUNER_OPENFHE_VERSION  the version found, empty if none
#   PRIVTUNER_OPENFHE_STATUS   one line for `privtuner info`
set(PRIVTUNER_OPENFHE AUTO CACHE STRING "Build the module for OpenFHE: AUTO (if OpenFHE is found), ON (required), OFF")
set_property(CACHE PRIVTUNER_OPENFHE PROPERTY STRINGS AUTO ON OFF)

set(PRIVTUNER_OPENFHE_USABLE OFF)
set(PRIVTUNER_OPENFHE_VERSION "")
if(PRIVTUNER_OPENFHE STREQUAL "OFF")
  set(PRIVTUNER_OPENFHE_STATUS "left out of this build (PRIVTUNER_OPENFHE=OFF)")
else()
  # Installations only: build trees that once registered themselves may be half built, or gone.
  find_package(OpenFHE 1.2 QUIET CONFIG NO_CMAKE_PACKAGE_REGISTRY NO_CMAKE_SYSTEM_PACKAGE_REGISTRY)
  if(OpenFHE_FOUND)
    find_library(PRIVTUNER_OPENFHE_PKE OPENFHEpke PATHS "${OpenFHE_LIBDIR}" NO_DEFAULT_PATH)
    mark_as_advanced(PRIVTUNER_OPENFHE_PKE)
    set(PRIVTUNER_OPENFHE_VERSION "${BASE_OPENFHE_VERSION}")
    if(NOT PRIVTUNER_OPENFHE_PKE)
      set(PRIVTUNER_OPENFHE_STATUS "${OpenFHE_DIR} names libraries in ${OpenFHE_LIBDIR} that are not there: install OpenFHE again")
    elseif(NOT OpenFHE_SHARED)
      set(PRIVTUNER_OPENFHE_STATUS "${OpenFHE_DIR} holds no shared libraries: build OpenFHE with BUILD_SHARED=ON")
    elseif(NOT OpenFHE_NATIVE_SIZE EQUAL 64)
      set(PRIVTUNER_OPENFHE_STATUS "${OpenFHE_DIR} has native integers of ${OpenFHE_NATIVE_SIZE} bits: build OpenFHE with NATIVE_SIZE=64")
    elseif(NOT OpenFHE_OPENMP)
      set(PRIVTUNER_OPENFHE_STATUS "${OpenFHE_DIR} was built without OpenMP: build OpenFHE with WITH_OPENMP=ON")
    else()
      set(PRIVTUNER_OPENFHE_USABLE ON)
      set(PRIVTUNER_OPENFHE_STATUS "${OpenFHE_LIBDIR}")
    endif()
  else()
    set(looked "CMAKE_PREFIX_PATH (${CMAKE_PREFIX_PATH} $ENV{CMAKE_PREFIX_PATH})")
    string(REGEX REPLACE "[ ;:]+" " " looked "${looked}")
    string(REGEX REPLACE "\\( *\\)" "(empty)" looked "${looked}")
    list(JOIN CMAKE_SYSTEM_PREFIX_PATH ", " prefixes)
    set(PRIVTUNER_OPENFHE_STATUS "no OpenFHE 1.2 or newer was found when privtuner was built (looked in ${looked}, ${prefixes})")
  endif()
  if(PRIVTUNER_OPENFHE STREQUAL "ON" AND NOT PRIVTUNER_OPENFHE_USABLE)
    message(FATAL_ERROR "PRIVTUNER_OPENFHE is ON: ${PRIVTUNER_OPENFHE_STATUS}")
  endif()
endif()
message(STATUS "OpenFHE: ${PRIVTUNER_OPENFHE_USABLE} (${PRIVTUNER_OPENFHE_VERSION} ${PRIVTUNER_OPENFHE_STATUS})")

# Flags of code that includes OpenFHE's headers, which depend on those OpenFHE was built with.
if(PRIVTUNER_OPENFHE_USABLE)
  # Its warnings, optimisation and -Werror are for its own code.
  separate_arguments(openfhe_flags UNIX_COMMAND "${OpenFHE_CXX_FLAGS}")
  list(FILTER openfhe_flags EXCLUDE REGEX "^-(W|O)")
  add_library(privtuner_openfhe_library INTERFACE)
  target_compile_options(privtuner_openfhe_library INTERFACE ${openfhe_flags})
  target_include_directories(privtuner_openfhe_library SYSTEM INTERFACE
    ${OpenFHE_INCLUDE} ${OpenFHE_INCLUDE}/third-party/include ${OpenFHE_INCLUDE}/core ${OpenFHE_INCLUDE}/pke
    ${OpenFHE_INCLUDE}/binfhe ${OPENMP_INCLUDES})
  # OpenFHE's libraries do not say where the others are: name all of them, needed or not.
  target_link_options(privtuner_openfhe_library INTERFACE -Wl,--no-as-needed)
  target_link_directories(privtuner_openfhe_library INTERFACE ${OpenFHE_LIBDIR} ${OPENMP_LIBRARIES})
  target_link_libraries(privtuner_openfhe_library INTERFACE ${OpenFHE_SHARED_LIBRARIES})
endif()
