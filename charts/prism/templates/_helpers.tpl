{{- define "prism.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- else if contains .Chart.Name .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name .Chart.Name | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "prism.operatorName" -}}
{{- include "prism.fullname" . }}-operator
{{- end -}}

{{/* Name of an object outside all namespaces. Takes (list . "operator"). The namespace is in it, for a release of this
name may be in another one too; a dot, which no namespace has, keeps two pairs apart. Past 63 characters a hash does. */}}
{{- define "prism.clusterName" -}}
{{- $root := index . 0 -}}
{{- $name := printf "%s-%s.%s" (include "prism.fullname" $root) (index . 1) $root.Release.Namespace -}}
{{- if gt (len $name) 63 -}}
{{- $name = printf "%s-%s" ($name | trunc 54 | trimSuffix "-") ($name | sha256sum | trunc 8) -}}
{{- end -}}
{{- $name -}}
{{- end -}}

{{- define "prism.serviceAccountName" -}}
{{- .Values.serviceAccount.name | default (include "prism.operatorName" .) -}}
{{- end -}}

{{- define "prism.adminKeySecret" -}}
{{- .Values.adminKey.existingSecret | default (printf "%s-admin-key" (include "prism.fullname" .)) -}}
{{- end -}}

{{- define "prism.selectorLabels" -}}
app.kubernetes.io/name: prism-operator
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "prism.labels" -}}
{{ include "prism.selectorLabels" . }}
app.kubernetes.io/component: operator
app.kubernetes.io/part-of: prism
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{/* The reference of one image. Takes (list . "operator"). */}}
{{- define "prism.image" -}}
{{- $root := index . 0 -}}
{{- $image := index $root.Values.image (index . 1) -}}
{{- $name := printf "%s/%s" $root.Values.image.registry $image.repository -}}
{{- if $image.digest -}}
{{- printf "%s@%s" $name $image.digest -}}
{{- else -}}
{{- printf "%s:%s" $name (coalesce $image.tag $root.Values.image.tag $root.Chart.AppVersion) -}}
{{- end -}}
{{- end -}}

{{/* Names of the pull secrets, for the operator to put into the pods it makes. */}}
{{- define "prism.pullSecretNames" -}}
{{- $names := list -}}
{{- range .Values.imagePullSecrets -}}
{{- $names = append $names .name -}}
{{- end -}}
{{- join "," $names -}}
{{- end -}}

{{/* The port of a URL: what it names, else its scheme's. */}}
{{- define "prism.urlPort" -}}
{{- $authority := (urlParse .).host -}}
{{- if regexMatch ":[0-9]+$" $authority -}}
{{- regexFind "[0-9]+$" $authority -}}
{{- else if hasPrefix "https:" . -}}
443
{{- else -}}
80
{{- end -}}
{{- end -}}

{{/* What the operator does in the namespaces it watches: the list in prism_operator/kube.py. */}}
{{- define "prism.operatorRules" -}}
- apiGroups: [moeprism.io]
  resources: [prismmodels]
  verbs: [get, list, watch, patch]
- apiGroups: [moeprism.io]
  resources: [prismmodels/status]
  verbs: [patch]
- apiGroups: [moeprism.io]
  resources: [prismmodels/finalizers]
  verbs: [update]
- apiGroups: [batch]
  resources: [jobs]
  verbs: [get, list, watch, create, delete]
- apiGroups: [apps]
  resources: [deployments]
  verbs: [get, list, watch, create, patch]
- apiGroups: [""]
  resources: [services, configmaps, persistentvolumeclaims]
  verbs: [get, list, create, patch]
- apiGroups: [networking.k8s.io]
  resources: [networkpolicies]
  verbs: [get, list, create, patch]
- apiGroups: [""]
  resources: [pods]
  verbs: [get, list, watch]
- apiGroups: [""]
  resources: [events]
  verbs: [create]
{{- end -}}
