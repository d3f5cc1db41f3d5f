#!/usr/bin/env bash
# What preempts another job.
sleep 1
