# Copyright 2026 The nemo_ee authors.
# SPDX-License-Identifier: Apache-2.0
