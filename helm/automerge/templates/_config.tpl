{{/* trigger.yaml. JSON is YAML too, and in it numbers stay what they are. */}}
{{- define "automerge.triggerConfig" -}}
{{- $t := .Values.trigger -}}
{{- $runner := merge (dict "folder" "/var/lib/automerge/runs") $t.runner -}}
{{- if eq $t.runner.kind "kfp" -}}
{{- $server := dict "endpoint" .Values.kfp.endpoint "namespace" (.Values.kfp.namespace | default nil) -}}
{{- $runner = merge $server (dict "pipeline" (include "automerge.pipeline" .) "experiment" .Values.kfp.experiment) $t.runner -}}
{{- end -}}
{{- dict
      "state" "/var/lib/automerge/trigger.sqlite"
      "registries" $t.registries
      "reconcile_seconds" $t.reconcileSeconds
      "max_body_bytes" $t.maxBodyBytes
      "replay_seconds" $t.replaySeconds
      "runner" $runner
      "rules" $t.rules | toPrettyJson -}}
{{- end }}
