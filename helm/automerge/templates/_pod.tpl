{{- define "automerge.podSecurityContext" -}}
runAsNonRoot: true
{{- with .Values.podSecurityContext }}
{{- range $key := list "runAsUser" "runAsGroup" "fsGroup" }}
{{- $value := index $.Values.podSecurityContext $key }}
{{- if not (kindIs "invalid" $value) }}
{{ $key }}: {{ $value | int64 }}
{{- end }}
{{- end }}
{{- end }}
fsGroupChangePolicy: OnRootMismatch
seccompProfile:
  type: RuntimeDefault
{{- end }}

{{- define "automerge.securityContext" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end }}

{{/* What every pod has that talks to Kubeflow Pipelines. */}}
{{- define "automerge.environment" -}}
- name: AUTOMERGE_LOG_FORMAT
  value: json
{{- with .Values.kfp.ui }}
- name: AUTOMERGE_KFP_UI
  value: {{ . | quote }}
{{- end }}
{{- if .Values.kfp.caConfigMap }}
- name: AUTOMERGE_KFP_CA_CERT
  value: /etc/automerge-ca/ca.crt
{{- end }}
{{- with .Values.kfp.existingSecret }}
- name: AUTOMERGE_KFP_TOKEN
  valueFrom:
    secretKeyRef: {name: {{ . }}, key: AUTOMERGE_KFP_TOKEN}
{{- end }}
{{- end }}

{{- define "automerge.volumeMounts" -}}
- name: tmp
  mountPath: /tmp
- name: config
  mountPath: /etc/automerge
  readOnly: true
{{- if .Values.kfp.serviceAccountToken.enabled }}
- name: kfp-token
  mountPath: /var/run/secrets/kubeflow/pipelines
  readOnly: true
{{- end }}
{{- if .Values.kfp.caConfigMap }}
- name: ca
  mountPath: /etc/automerge-ca
  readOnly: true
{{- end }}
{{- end }}

{{- define "automerge.volumes" -}}
- name: tmp
  emptyDir:
    sizeLimit: 1Gi
- name: config
  configMap:
    name: {{ printf "%s-%s" (include "automerge.fullname" .root) .component }}
{{- if .root.Values.kfp.serviceAccountToken.enabled }}
- name: kfp-token
  projected:
    sources:
      - serviceAccountToken:
          path: token
          expirationSeconds: 7200
          audience: {{ .root.Values.kfp.serviceAccountToken.audience | quote }}
{{- end }}
{{- with .root.Values.kfp.caConfigMap }}
- name: ca
  configMap:
    name: {{ . }}
{{- end }}
{{- end }}

{{/* Where pods run. */}}
{{- define "automerge.placement" -}}
{{- with .nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}
