#!/bin/sh
# Train the quarter-width hippocampus student without a teacher, measure it, and make its bundle.
# Usage: reproduce.sh TEACHER DATA WORK_FOLDER OUTPUT
#   TEACHER      nnU-Net results folder (its plans and, for comparison, its weights)
#   DATA         folder with images/ and labels/ of the 208 cases
#   WORK_FOLDER  where everything unfinished goes; a run that was stopped goes on from there
#   OUTPUT       folder of the bundle, for example models/bundles/hippocampus/0.1.0
# Run it in the root of a checkout with its environment active.
set -eu
teacher=$1 data=$2 work=$3 output=$4
here=training/results/hippocampus-baseline
split=training/results/hippocampus-split.json
student=$work/results/Dataset004_Hippocampus/nnUNetTrainer__nnUNetPlansWidth1of4__3d_fullres

python -m training.train_baseline "$teacher" "$data" "$split" "$work" \
    --width 1/4 --epochs 20 --validation-iterations 20
python -m training.icbm_crop "$work/golden.nii.gz"

export_bundle() {
    segnode-train export "$@" --golden-image "$work/golden.nii.gz" --labels-file "$here/labels.yaml" \
        --training-images "$data/images"
}
measure() {
    segnode-train evaluate "$1" "$data" --split "$split" --list "$3" --name "$4" -o "$2"
}

# The figures go into the bundle, so the student is exported twice; its weights are the same both times.
rm -rf "$work/bundles"
export_bundle "$teacher" --name hippocampus-teacher -o "$work/bundles/teacher" --method "nnU-Net training"
export_bundle "$student" --name hippocampus -o "$work/bundles/student" --teacher "$teacher"
for list in choose claim; do
    measure "$work/bundles/teacher" "$here/teacher.$list.json" $list "teacher"
    measure "$work/bundles/student" "$here/student.$list.json" $list "width 1/4, no teacher"
done
export_bundle "$student" --name hippocampus --version "$(basename "$output")" -o "$output" --teacher "$teacher" \
    --method "nnU-Net's own training at a quarter of the teacher's width; nothing was distilled" \
    --recipe "$here/reproduce.sh" \
    --evaluation "teacher=$here/teacher.claim.json" --evaluation "float32=$here/student.claim.json" \
    --evaluated-on "the 'claim' cases of training/results/hippocampus-split.json, without mirroring"
cat "$student"/fold_0/training_log_*.txt | grep -E "Epoch|learning rate|_loss|Pseudo dice" > "$here/training.log"
