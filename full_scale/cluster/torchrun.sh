#!/usr/bin/env bash
# Two nodes of eight GPUs without a scheduler.  On the first, and with NODE=1 on the second:
#     NODE=0 HOST=ADDRESS_OF_THE_FIRST bash torchrun.sh FLAGS OF train_leap_align.py
exec torchrun --nnodes="${NODES:-2}" --node_rank="${NODE:?0 on the first node, else 1}" --nproc_per_node="${GPUS:-8}" \
    --master_addr="${HOST:?the address of the first node}" --master_port="${PORT:-29500}" \
    --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 --shutdown-timeout=600 \
    train_leap_align.py "$@" --resume
