#!/bin/sh
# Train the brain networks on images drawn from label maps, measure them, and make their bundles.
# Usage: reproduce.sh MAPS SCANS WORK_FOLDER [SPACING [RECIPE...]]
#   MAPS         folder with training_label_maps/ and labels_classes_priors/ (20 maps; SynthSeg's repository)
#   SCANS        folder whose NIfTI files and DICOM series are real scans to look at; may be empty
#   WORK_FOLDER  where everything goes; a run that was stopped goes on from its last epoch
#   SPACING      2mm  the student that ships (the default): without a teacher, channels in multiples of 16,
#                     in four parts, each from the weights of the one before
#                4mm  teacher, none, logits and DCD side by side, as far as a CPU can take them
#                1mm  the same on a GPU
#   RECIPE       which runs instead, by their names in training/recipes
# START=FOLDER goes on from a trained student: START=training/results/brain-structures/student reproduce.sh
# MAPS SCANS WORK_FOLDER 2mm brain-none-1of4by16-2mm-more is the shipped student with 2,500 iterations more, and
# with brain-none-2mm-wider instead it is a student of more channels that goes on from it.
# CHECKPOINT=best makes the bundle of the best epoch so far (while a run goes on, too: TRAIN=no).
# RECIPES=FOLDER takes recipes of the same names from elsewhere. VERSION is the bundles' version: give a new one
# to a bundle that leaves this machine. Nothing outside of WORK_FOLDER is written.
# Run it in the root of a checkout with its environment active.
set -eu
maps=$1 scans=$2 work=$3 spacing=${4:-2mm}
if [ $# -gt 4 ]; then
    shift 4
elif [ "$spacing" = 2mm ]; then
    set -- brain-none-1of4by16-2mm-more
else
    set -- "brain-teacher-$spacing" "brain-none-1of4-$spacing" "brain-logits-1of4-$spacing" \
        "brain-dcd-1of4-$spacing" "brain-dcd-logits-1of4-$spacing"
fi
here=training/results/brain-structures
split=training/results/brain-split.json
recipes=${RECIPES:-training/recipes}
checkpoint=${CHECKPOINT:-final}
version=${VERSION:-0.0.1}
plans=$work/plans-$spacing
claim="nine heads at 1 mm drawn from the 3 'claim' label maps of brain-split.json (T1-like, FLAIR-like and random contrast)"
found() { ls -d "$1"/results/*/*__3d_fullres; }
part() { # part RECIPE TEACHER_OR_PLANS START: train, or go on
    segnode-train distill "$2" "$maps" --recipe "$recipes/$1.yaml" --split "$split" \
        ${3:+--start-from "$3"} -o "$work/$1"
}
coarse() { # the 4 mm student, from nothing
    python -m training.synthesis.plans 4mm "$work/plans-4mm"
    part brain-none-1of4by16-4mm "$work/plans-4mm" ""
}

python -m training.synthesis.plans "$spacing" "$plans"
if [ ! -d "$work/claim" ]; then
    rm -rf "$work/claim.unfinished"
    python -m training.synthesis.cases "$maps" "$split" claim "$work/claim.unfinished"
    mv "$work/claim.unfinished" "$work/claim"
fi
python -m training.synthesis.golden "$work/golden.nii.gz"

for recipe in "$@"; do
    from=$plans
    case $recipe in *logits* | *dcd* | brain-none-1of4-4mm) from=$(found "$work/brain-teacher-$spacing") ;; esac
    if [ "${TRAIN:-yes}" = yes ]; then
        start=${START:-}
        if [ -z "$start" ] && [ "$spacing" = 4mm ]; then
            coarse
            start=$(found "$work/brain-none-1of4by16-4mm")
        elif [ -z "$start" ] && [ "$recipe" = brain-none-1of4by16-2mm-more ]; then
            coarse
            part brain-none-1of4by16-2mm-short "$plans" "$(found "$work/brain-none-1of4by16-4mm")"
            part brain-none-1of4by16-2mm-last "$plans" "$(found "$work/brain-none-1of4by16-2mm-short")"
            start=$(found "$work/brain-none-1of4by16-2mm-last")
        elif [ -z "$start" ] && [ "$recipe" = brain-none-2mm-wider ]; then
            start=$here/student
        fi
        part "$recipe" "$from" "$start"
    fi
    bundle=$work/bundles/$recipe
    rm -rf "$bundle" "$bundle-$version"
    segnode-train export "$(found "$work/$recipe")" --name brain-structures -o "$bundle" \
        --checkpoint "$checkpoint" --golden-image "$work/golden.nii.gz" --labels-file "$here/labels.yaml" \
        --method "training on images drawn from label maps, recipe $recipe" --recipe "$recipe"
    segnode-train evaluate "$bundle" "$work/claim" --name "$recipe" -o "$work/evaluations/$recipe.json"
    segnode-train ship "$bundle" --version "$version" --figures "float32=$work/evaluations/$recipe.json" \
        --evaluated-on "$claim" --labels-file "$here/labels.yaml" -o "$bundle-$version"
    (
        set -- # the scans, whatever their names
        for scan in "$scans"/*; do [ ! -e "$scan" ] || set -- "$@" "$scan"; done
        python -m training.synthesis.real_scans "$bundle-$version" "$work/scans/$recipe" "$@"
    )
done

if [ "$spacing" = 2mm ]; then
    for recipe in "$@"; do
        folder=$work/scans/$recipe
        python -m training.synthesis.consistency "$work/bundles/$recipe-$version" "$folder/consistency.json"
        [ -e "$folder/README.md" ] || cp "$here/README.md" "$folder/README.md"
        python -m training.synthesis.scan_report "$work/bundles/$recipe-$version" "$folder" "$folder/README.md"
    done
elif [ $# -gt 1 ]; then
    {
        echo "title: Teacher and students of the brain at ${spacing%mm} mm"
        echo "cases: ${claim%% (*}"
        case " $* " in *" brain-teacher-$spacing "*) echo "teacher: brain-teacher-$spacing" ;; esac
        case " $* " in *" brain-none-1of4-$spacing "*) echo "baseline: brain-none-1of4-$spacing" ;; esac
        echo "runs:"
        for recipe in "$@"; do
            results=$(realpath "$(found "$work/$recipe")")
            echo "  - {name: $recipe, results: \"$results\", evaluations: [evaluations/$recipe.json]}"
        done
    } > "$work/table.yaml"
    segnode-train report "$work/table.yaml" -o "$work/table"
fi
