{{- define "automerge.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 40 | trimSuffix "-" -}}
{{- end }}

{{- define "automerge.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- $name := include "automerge.name" . -}}
{{- $full := ternary .Release.Name (printf "%s-%s" .Release.Name $name) (contains $name .Release.Name) -}}
{{- $full | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end }}

{{/* What selects an object's pods; it never changes, since selectors cannot. */}}
{{- define "automerge.selector" -}}
app.kubernetes.io/name: {{ include "automerge.name" .root }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{- define "automerge.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}
{{ include "automerge.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
app.kubernetes.io/part-of: automerge
{{- with .root.Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* What it is: name, namespace, labels; `.suffix` is a part of the name of its own. */}}
{{- define "automerge.metadata" -}}
name: {{ printf "%s-%s" (include "automerge.fullname" .root) (.suffix | default .component) }}
namespace: {{ .namespace | default .root.Release.Namespace }}
labels:
  {{- include "automerge.labels" . | nindent 2 }}
{{- end }}

{{- define "automerge.serviceAccount" -}}
{{- $account := (index .root.Values .component).serviceAccount -}}
{{- if $account.create -}}
{{- $account.name | default (printf "%s-%s" (include "automerge.fullname" .root) .component) -}}
{{- else -}}
{{- $account.name | default "default" -}}
{{- end -}}
{{- end }}

{{- define "automerge.image" -}}
{{- if .Values.image.digest -}}
{{ .Values.image.repository }}@{{ .Values.image.digest }}
{{- else -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end -}}
{{- end }}

{{- define "automerge.runsNamespace" -}}
{{- .Values.kfp.namespace | default .Release.Namespace -}}
{{- end }}

{{- define "automerge.pipeline" -}}
{{- .Values.deploy.settings.name | default "automerge-merge" -}}
{{- end }}

{{- define "automerge.pushgateway" -}}
{{- if .Values.pushgateway.enabled -}}
http://{{ .Release.Name }}-pushgateway.{{ .Release.Namespace }}:9091
{{- else -}}
{{- .Values.pushgateway.url -}}
{{- end -}}
{{- end }}
