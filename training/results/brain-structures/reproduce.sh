#!/bin/sh
# Train the brain networks on images drawn from label maps, measure them, and make their bundles.
# Usage: reproduce.sh MAPS SCANS WORK_FOLDER [SPACING [RECIPE...]]
#   MAPS         folder with training_label_maps/ and labels_classes_priors/ (20 maps; SynthSeg's repository)
#   SCANS        folder whose NIfTI files and DICOM series are real scans to look at; may be empty
#   WORK_FOLDER  where everything goes; a run that was stopped goes on from its last epoch
#   SPACING      2mm (a CPU can do it; the default) or 1mm (a GPU)
#   RECIPE       which runs: by default the student without a teacher whose channels are multiples of 16 at
#                2 mm, in three parts, each from the weights of the one before (4 mm, 2 mm with small classes
#                weighing more, 2 mm); and at 1 mm the teacher and its students
# START=FOLDER goes on from a trained student: START=training/results/brain-structures/student reproduce.sh
# MAPS SCANS WORK_FOLDER 2mm brain-none-1of4by16-2mm is the shipped student with ten times its budget.
# CHECKPOINT=best makes the bundle of the best epoch so far (while a run goes on, too: TRAIN=no).
# Run it in the root of a checkout with its environment active.
set -eu
maps=$1 scans=$2 work=$3 spacing=${4:-2mm}
[ $# -gt 4 ] && shift 4 || set -- $([ "$spacing" = 1mm ] &&
    echo brain-teacher-1mm brain-none-1of4-1mm brain-logits-1of4-1mm brain-dcd-1of4-1mm brain-dcd-logits-1of4-1mm ||
    echo brain-none-1of4by16-2mm-last)
here=training/results/brain-structures
split=training/results/brain-split.json
checkpoint=${CHECKPOINT:-final}
plans=$work/plans-$spacing
teacher=$work/brain-teacher-$spacing
found() { ls -d "$1"/results/*/*__3d_fullres; }
part() { # part RECIPE TEACHER_OR_PLANS START: train, or go on
    segnode-train distill "$2" "$maps" --recipe "training/recipes/$1.yaml" --split "$split" \
        ${3:+--start-from "$3"} -o "$work/$1"
}

python -m training.synthesis.plans "$spacing" "$plans"
[ -d "$work/claim/images" ] || python -m training.synthesis.cases "$maps" "$split" claim "$work/claim"
python -m training.synthesis.golden "$work/golden.nii.gz"

for recipe in "$@"; do
    from=$plans
    case $recipe in *logits*|*dcd*) from=$(found "$teacher") ;; esac
    if [ "${TRAIN:-yes}" = yes ]; then
        start=${START:-}
        if [ "$recipe" = brain-none-1of4by16-2mm-last ] && [ -z "$start" ]; then
            python -m training.synthesis.plans 4mm "$work/plans-4mm"
            part brain-none-1of4by16-4mm "$work/plans-4mm" ""
            part brain-none-1of4by16-2mm-short "$plans" "$(found "$work/brain-none-1of4by16-4mm")"
            start=$(found "$work/brain-none-1of4by16-2mm-short")
        fi
        part "$recipe" "$from" "$start"
    fi
    bundle=$work/bundles/$recipe
    rm -rf "$bundle"
    segnode-train export "$(found "$work/$recipe")" --name brain-structures -o "$bundle" \
        --checkpoint "$checkpoint" --golden-image "$work/golden.nii.gz" --labels-file "$here/labels.yaml" \
        --method "training on images drawn from label maps, recipe $recipe" --recipe "$recipe"
    segnode-train evaluate "$bundle" "$work/claim" --name "$recipe" -o "$work/evaluations/$recipe.json"
    python -m training.synthesis.real_scans "$bundle" "$work/scans/$recipe" \
        $(find "$scans" -mindepth 1 -maxdepth 1 2>/dev/null)
    python -m training.synthesis.consistency "$bundle" "$work/scans/$recipe/consistency.json"
    python -m training.synthesis.scan_report "$bundle" "$work/scans/$recipe" "$here/README.md"
done
