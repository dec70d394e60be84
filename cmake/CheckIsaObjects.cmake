# Run as a test: cmake -DOBJECTS=a.o,b.o -DPATHS=avx2,avx512 -DNM=nm -P CheckIsaObjects.cmake
#
# An inline function or a template that an ISA file emits is a weak symbol, and the linker may keep that copy for the
# whole program: code for a newer processor would then run on an older one. So the weak functions of an ISA object must
# be its own, with the path in their names; whatever else a kernel needs stays in an anonymous namespace or is inlined.
string(REPLACE "," ";" objects "${OBJECTS}")
string(REPLACE "," "|" paths "${PATHS}")
list(FILTER objects INCLUDE REGEX "_(${paths})\\.cpp\\.o$")
set(faults "")
foreach(object IN LISTS objects)
  string(REGEX MATCH "_(${paths})\\.cpp\\.o$" path "${object}")
  set(path ${CMAKE_MATCH_1})
  execute_process(COMMAND "${NM}" -C --defined-only "${object}" OUTPUT_VARIABLE symbols COMMAND_ERROR_IS_FATAL ANY)
  string(REGEX MATCHALL "[^\n]* W [^\n]*" weak "${symbols}")
  foreach(symbol IN LISTS weak)
    if(NOT symbol MATCHES "${path}([^0-9a-z]|$)")
      string(APPEND faults "\n  ${object}: ${symbol}")
    endif()
  endforeach()
endforeach()
list(LENGTH objects count)
if(count EQUAL 0 OR faults)
  message(FATAL_ERROR "${count} objects checked; shared functions compiled for one instruction set:${faults}")
endif()
message(STATUS "${count} objects checked")
