#!/bin/sh
# Compile Triton's own ONNX Runtime backend, for the CPU, from its sources, for the embedded server:
#
#   PYTHON=.venv/bin/python sh python_backend/native_backend.sh backends
#   NOISEC_BACKENDS=backends .venv/bin/noisec serve model_repository
#
# PYTHON has the onnxruntime whose library it is linked with. Sources come from GitHub; git, g++ and rapidjson's headers have to be there.
set -eu

release=r24.10 # the embedded server's
out=${1:?say where the backend shall be: $0 DIR}
python=${PYTHON:-python3}

refuse() {
    echo "native backend: $1" >&2
    exit 1
}
for tool in git g++; do
    command -v "$tool" >/dev/null || refuse "there is no $tool: apt-get install git g++ rapidjson-dev"
done
echo '#include <rapidjson/document.h>' | g++ -fsyntax-only -x c++ - 2>/dev/null || refuse "there are no headers of rapidjson: apt-get install rapidjson-dev"
version=$("$python" -c 'import onnxruntime; print(onnxruntime.__version__)') || refuse "$python has no onnxruntime: pip install '.[serve]', or set PYTHON"
library=$("$python" -c 'import onnxruntime; print(onnxruntime.__path__[0])')/capi/libonnxruntime.so.$version
[ -f "$library" ] || refuse "$library: no such file; onnxruntime is not of PyPI"

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for name in onnxruntime_backend backend core common; do
    git -c advice.detachedHead=false clone --quiet --depth 1 --branch "$release" "https://github.com/triton-inference-server/$name" "$work/$name"
done
git -c advice.detachedHead=false clone --quiet --depth 1 --branch "v$version" --filter=blob:none --sparse https://github.com/microsoft/onnxruntime "$work/onnxruntime"
git -C "$work/onnxruntime" sparse-checkout set --no-cone /include/onnxruntime/core/session

target=$out/onnxruntime
mkdir "$work/objects"
find "$work/backend/src" "$work/onnxruntime_backend/src" -maxdepth 1 -name '*.cc' ! -name device_memory_tracker.cc >"$work/sources"
printf "$work/common/src/%s.cc\n" async_work_queue error thread_pool >>"$work/sources"
headers="$work/onnxruntime/include $work/onnxruntime/include/onnxruntime/core/session $work/onnxruntime_backend/src"
headers="$headers $work/backend/include $work/core/include $work/common/include"
# shellcheck disable=SC2046,SC2086 # several words each; a folder of mktemp has no spaces
xargs -P "$(nproc)" -I{} sh -c 'g++ "$@" -c {} -o "$0/$(basename {} .cc).o"' "$work/objects" \
    -std=c++17 -O2 -fPIC -w -DTRITON_ENABLE_STATS=1 -DTRITON_ENABLE_LOGGING=1 $(printf -- '-I%s ' $headers) <"$work/sources"
g++ -shared -o "$work/libtriton_onnxruntime.so" "$work"/objects/*.o "$library" -lpthread -ldl \
    -Wl,--version-script="$work/onnxruntime_backend/src/libtriton_onnxruntime.ldscript" -Wl,-rpath,'$ORIGIN'
mkdir -p "$target"
cp "$library" "$target/libonnxruntime.so.1"
cp "$work/libtriton_onnxruntime.so" "$target"
echo "$target: Triton's own ONNX Runtime backend $release, with ONNX Runtime $version; serve with NOISEC_BACKENDS=$out"
